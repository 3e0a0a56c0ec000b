"""Policies that run every layer and train some that lie together."""

import pytest

from fleetune.device_runtime.contracts.plans import Mode, active_layers, trained_layers
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import make_policy


def trained(num_layers, *steps, **fields):
    policy = make_policy(PolicySpec(**fields), num_layers)
    plans = [policy(step, Draws(0, "plans", 0), {}) for step in steps]
    assert all(len(active_layers(plan)) == num_layers for plan in plans)
    assert all(set(plan) <= {Mode.TRAIN, Mode.FORWARD} for plan in plans)
    return [trained_layers(plan) for plan in plans]


def top(count, num_layers=12):
    return tuple(range(num_layers - count, num_layers))


def test_a_suffix_grows_by_its_width_in_each_period_up_to_the_share():
    found = trained(12, 0, 4, 5, 9, 10, 14, 15, 10**6, name="growing", drop=0.25, period=5, width=4)
    assert found == [top(n) for n in (4, 4, 8, 8, 9, 9, 9, 9)]
    assert trained(12, 0, 99, name="growing", period=1, width=5) == [top(5), top(12)]
    assert trained(12, 0, 99, name="growing", drop=0.5, period=1, width=9) == [top(6), top(6)]


def test_a_block_is_trained_where_it_lies():
    assert trained(12, 0, 99, name="block", width=3, first=2) == [(2, 3, 4)] * 2
    assert trained(1, 0, name="block", width=1) == [(0,)]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "growing"}, "needs a period of at least 1 step, got 0; needs a width of at least 1 layer, got 0"),
        ({"name": "growing", "period": 1, "width": 13}, "wants layers 0 to 12; the model's last is 11"),
        ({"name": "block"}, "needs a width of at least 1 layer, got 0"),
        ({"name": "block", "width": 4, "first": 9}, "wants layers 9 to 12; the model's last is 11"),
        ({"name": "block", "width": 4, "drop": 0.5}, "has no use for drop, got 0.5"),
        ({"name": "block", "width": -1}, "width must be at least 0, got -1"),
        ({"name": "suffix", "width": 2}, "has no use for width, got 2; policies that have: block, coto, dropbp, growing"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(fields, said):
    with pytest.raises(ConfigError) as caught:
        make_policy(PolicySpec(**fields), 12)
    assert said in str(caught.value)
