from pathlib import Path

from fleetune.device_runtime.contracts.run_file import plain
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec


def test_arguments_become_plain_and_structs_stay_nested():
    work = LocalWork(steps=3, optimizer=OptimizerSpec(lr=1.0))
    given = {"out": Path("run"), "rules": {"file": Path("a")}, "work": work, "eval": None, "on_step": print}
    found = plain(given)
    assert (found["out"], found["rules"], found["eval"]) == ("run", {"file": "a"}, None)
    assert (found["work"]["steps"], found["work"]["optimizer"]["lr"]) == (3, 1.0)
    assert "on_step" not in found
