from math import nan
from statistics import median

import numpy as np
import pytest

from fleetune.broker.methods.bandit import (
    NOTHING,
    Trial,
    effects,
    gain_of,
    lasting,
    median_without,
    seconds_of,
)
from fleetune.device_runtime.contracts.work import PolicySpec

FULL, HALF = PolicySpec(), PolicySpec(name="suffix", drop=0.5)


def test_round_arm_and_device_are_told_apart():
    """Gains fall from round to round, one arm gains 0.02 more, and each device has a level of its own."""
    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.1, 12)
    trials = [
        Trial(
            f"d{i}",
            arm := (FULL, HALF)[int(rng.integers(2))],
            n,
            0.5 / n + own[i] + 0.02 * (arm == FULL) + rng.normal(0, 0.002),
            1.0,
        )
        for n in range(1, 9)
        for i in range(12)
    ]
    found = effects(trials)
    assert found.arms[FULL].mean - found.arms[HALF].mean == pytest.approx(0.02, abs=0.004)
    assert found.spread < 0.02
    assert {estimate.num_trials for estimate in found.arms.values()} <= set(range(18, 25)), "two of a device"


def test_one_device_moves_an_arm_little():
    trials = [Trial(f"d{i}", HALF if i % 2 else FULL, n, 0.1, 1.0) for n in range(1, 5) for i in range(10)]
    told = [trial._replace(gain=1000.0) if trial.device_id == "d1" else trial for trial in trials]
    assert abs(effects(told).arms[HALF].mean - effects(trials).arms[HALF].mean) < 0.01


def test_nothing_told_is_nothing_known():
    assert effects([Trial("d", FULL, 1, nan, 1.0)]) == NOTHING
    assert effects([]) == NOTHING


def test_what_lasts_is_what_the_next_round_begins_with():
    """Each device gains 0.5 a round, of which the average leaves 0.1."""
    trials = [Trial(f"d{i}", FULL, n, 0.5, 1.0, 2.0 - 0.1 * n + i) for n in range(1, 6) for i in range(4)]
    assert lasting(trials, 0.5) == pytest.approx(0.1)
    assert lasting(trials[:4], 0.5) == 0.5, "nobody was asked twice"
    worse = [trial._replace(loss=trial.round) for trial in trials]
    assert lasting(worse, 0.5) == 0.0


@pytest.mark.parametrize("numbers", [[1.0], [1.0, 5.0], [1.0, 2.0, 7.0], [1.0, 2.0, 2.0, 9.0]])
def test_a_median_without_one(numbers):
    for place, one in enumerate(numbers):
        rest = numbers[:place] + numbers[place + 1 :]
        assert median_without(numbers, one) == (median(rest) if rest else 0.0)
    assert median_without(numbers, nan) == median(numbers)
    assert median_without(numbers, 1.5) == median(numbers)


@pytest.mark.parametrize(
    ("before", "after"),
    [(nan, 1.0), (1.0, nan), (-1.0, 0.0), (1e300, 0.0), (float("inf"), 1.0), (None, 1.0), (1.0, -3.0)],
)
def test_a_loss_that_is_none_is_no_gain(before, after):
    stats = {} if before is None else {"held_loss_before": before}
    assert gain_of({**stats, "held_loss_after": after}) != gain_of({**stats, "held_loss_after": after})
    assert gain_of({"held_loss_before": 2.0, "held_loss_after": 1.5}) == 0.5


@pytest.mark.parametrize("seconds", [nan, 0.0, -1.0, 1e300, float("inf")])
def test_seconds_that_are_none_are_left_out(seconds):
    assert seconds_of({"seconds": seconds}) != seconds_of({"seconds": seconds})
    assert seconds_of({"seconds": 2.0}) == 2.0
