from pathlib import Path

import pytest

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.run_file import RUN, find_adapter, plain, write_run
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.errors import ArtifactError, StateError


def test_arguments_become_plain_and_structs_stay_nested():
    work = LocalWork(steps=3, optimizer=OptimizerSpec(lr=1.0))
    given = {"out": Path("run"), "rules": {"file": Path("a")}, "work": work, "eval": None, "on_step": print}
    found = plain(given)
    assert (found["out"], found["rules"], found["eval"]) == ("run", {"file": "a"}, None)
    assert (found["work"]["steps"], found["work"]["optimizer"]["lr"]) == (3, 1.0)
    assert "on_step" not in found


@pytest.mark.parametrize("inner", ["adapter", "run/adapter", "."])
def test_the_adapter_of_every_kind_of_run_is_found(tmp_path, inner):
    with pytest.raises(ArtifactError, match="no adapter here"):
        find_adapter(tmp_path / "home")
    folder = tmp_path / "home" / inner
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    assert find_adapter(tmp_path / "home") == folder


def test_a_run_that_cannot_be_written_is_told_with_its_place(tmp_path, word_artifact):
    (tmp_path / RUN / "in the way").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StateError, match=r"run\.json: cannot be written: (Is a directory|No such file)"):
            write_run(folder, open_artifact(word_artifact), {}, LocalWork())


def test_an_adapter_with_a_name_is_pointed_at(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"no adapter here .*; give .*/mine, or the --out folder of train"
    ):
        find_adapter(tmp_path)
