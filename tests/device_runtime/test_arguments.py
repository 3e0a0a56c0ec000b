import inspect
from pathlib import Path

import pytest
from msgspec.structs import asdict

from fleetune.broker.aggregation import aggregate
from fleetune.broker.job import Patience
from fleetune.device_runtime.arguments import picked, plain
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.commands.train import train
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec
from fleetune.device_runtime.training.machine import Resources


def test_fields_are_picked_by_name_others_win_and_the_rest_keep_their_defaults():
    arguments = {"lr": 0.5, "decay": "linear", "seed": 7, "data": "x"}
    assert picked(OptimizerSpec, arguments) == OptimizerSpec(lr=0.5, decay="linear")
    assert picked(LocalWork, arguments, steps=3, seed=0) == LocalWork(steps=3)


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        (Resources, train),
        (Resources, device),
        (OptimizerSpec, train),
        (OptimizerSpec, aggregate),
        (Patience, aggregate),
    ],
)
def test_every_field_is_an_argument_with_the_same_default(kind, function):
    parameters = inspect.signature(function).parameters
    defaults = {"optimizer" if name == "name" else name: value for name, value in asdict(kind()).items()}
    assert {name: parameters[name].default for name in defaults} == defaults


def test_arguments_become_plain():
    given = {"out": Path("run"), "rules": {"file": Path("a")}, "lr": 1.0, "on_step": print}
    assert plain(given) == {"out": "run", "rules": {"file": "a"}, "lr": 1.0}
