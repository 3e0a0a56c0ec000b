import inspect
from pathlib import Path

import pytest
from msgspec.structs import asdict

from broker.aggregation import aggregate
from broker.settings import Patience
from device_runtime.arguments import picked, plain
from device_runtime.device import device
from device_runtime.machine import Resources
from device_runtime.training import train
from device_runtime.wire import LocalWork, OptimizerSpec


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
