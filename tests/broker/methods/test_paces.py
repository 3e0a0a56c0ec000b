"""Paces of devices and costs of arms, from seconds that are their products."""

from itertools import product

import pytest

from fleetune.broker.methods.paces import Timed, paces

PACES = {"a": 1.0, "b": 2.0, "c": 5.0}
COSTS = {"full": 30.0, "half": 12.0, "cached": 4.0}
PRIORS = {"full": 30.0, "half": 21.0, "cached": 15.0}


def told(pairs):
    return [Timed(device, arm, PACES[device] * COSTS[arm]) for device, arm in pairs]


def test_costs_and_paces_are_found_from_their_products():
    found = paces(told(list(product(PACES, COSTS)) * 20), PRIORS)
    for device, arm in product(PACES, COSTS):
        assert found.seconds(device, arm, 99.0) == pytest.approx(PACES[device] * COSTS[arm], rel=0.1)
    assert found.middle == found.by_device["b"]
    assert found.seconds("unknown", "full", 99.0) == pytest.approx(60.0, rel=0.1)


def test_a_device_that_tried_only_a_cached_arm_is_not_taken_for_a_quick_one():
    """Its seconds are a quarter of what was expected of such work; so are everyone's."""
    others = [(device, arm) for device in "ab" for arm in ("full", "cached")] * 5
    found = paces(told([*others, ("c", "cached")]), PRIORS)
    assert found.seconds("c", "full", 0.0) == pytest.approx(150.0, rel=0.25)
    alone = paces(told([("c", "cached")]), PRIORS)
    assert alone.seconds("c", "full", PRIORS["full"]) < 60, "alone it would be"


def test_what_is_not_known_before_is_told_by_those_who_did_both():
    """A pass of which nobody knows the cost: who did no more is placed beside those who trained too."""
    passes = [Timed(device, "pass", 3.0 * pace) for device, pace in PACES.items()]
    alone = paces(passes, {"pass": 0.0})
    assert alone.by_device == {"a": 3.0, "b": 6.0, "c": 15.0}
    both = paces([*passes, *told([("a", "full")])], {**PRIORS, "pass": 0.0})
    assert both.seconds("c", "full", 0.0) == pytest.approx(150.0)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_seconds_that_are_none_are_left_out(seconds):
    assert paces([Timed("a", "full", seconds)], PRIORS).by_device == {}
    assert paces([], {}).middle == 0.0
