"""Statistics of a bandit whose arms are tried by many devices at once: what each arm gains.

A gain falls from round to round as the model learns, differs from device to device as their data do, and is measured on few
samples. So a gain is taken for the sum of a round's level, an arm's effect, a device's effect and noise, and the three are
estimated in turns from the trials of the last rounds. Of an arm's gains the outer fifths are drawn in, a round's level is a
median, and a device's effect is shrunk: no single device moves an arm far. Ours.
"""

from bisect import bisect_left
from collections.abc import Hashable, Mapping, Sequence
from math import isfinite, nan, sqrt
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.fields import SECONDS_MAX
from fleetune.device_runtime.contracts.work import PolicySpec

Doubles = NDArray[np.float64]
Codes = NDArray[np.intp]

LOSS_MAX = 1e3
"""A mean loss beyond this is no measurement."""
_PASSES = 4
_LASTING_ROUNDS, _LASTING_LEAST = 3, 3
_FAR = 5.0
"""Median absolute deviations from the median beyond which a gain is drawn in."""
_DEVICE_TRIALS = 2
"""Of one device that count for an arm's number of trials, where there are three devices: no arm is judged by one alone."""
_OUTER = 0.2
"""Share of an arm's gains on either side that is drawn in to the next one."""
_DEVICE_PSEUDO, _ARM_PSEUDO = 1.0, 1.0
"""So many trials of no effect are added to those of a device, and of an arm."""
_NORMAL_MAD = 1.4826
"""Standard deviation of a normal distribution by its median absolute deviation."""


class Trial(NamedTuple):
    """What came of an arm on a device in a round; ``gain`` and ``seconds`` are NaN where they were not told, or nonsense."""

    device_id: str
    arm: PolicySpec
    round: int
    gain: float
    """Loss on the device's held-out part before, less that after."""
    seconds: float
    loss: float = nan
    """On the held-out part before."""
    below: int = 0
    """Layers whose work a hidden cache does."""


class Estimate(NamedTuple):
    """Effect of an arm beside the average one."""

    mean: float
    error: float
    """Standard error of the mean."""
    num_trials: int


class Effects(NamedTuple):
    """What the gains of the last rounds come to."""

    level: float
    """Gain of an average arm on an average device in the newest round, as far as it lasts: see :func:`lasting`."""
    arms: Mapping[PolicySpec, Estimate]
    spread: float
    """Standard deviation of the noise."""
    residuals: Mapping[tuple[str, PolicySpec], tuple[float, int]]
    """By device and arm: (sum of what round and device leave unexplained, trials)."""


NOTHING = Effects(0.0, {}, 0.0, {})


def gain_of(stats: Mapping[str, float]) -> float:
    """Loss that a run took off its device's held-out part; NaN if the figures are missing or no measurement."""
    before, after = stats.get("held_loss_before", nan), stats.get("held_loss_after", nan)
    return before - after if 0 <= before <= LOSS_MAX and 0 <= after <= LOSS_MAX else nan


def seconds_of(stats: Mapping[str, float]) -> float:
    """Seconds that a run trained; NaN if it does not say, or says nonsense."""
    found = stats.get("seconds", nan)
    return found if 0 < found <= SECONDS_MAX else nan


def batch_s(stats: Mapping[str, float], batch_size: int) -> float:
    """Seconds of a batch in the pass for a class-mean head; NaN if it does not say, or says nonsense."""
    seconds, samples = seconds_of(stats), stats.get("samples", nan)
    return seconds * batch_size / samples if 0 < samples <= SECONDS_MAX else nan


def effects(trials: Sequence[Trial]) -> Effects:
    """Part the gains of trials into round, arm and device."""
    told = [trial for trial in trials if isfinite(trial.gain)]
    if not told:
        return NOTHING
    gains = _clipped(np.array([trial.gain for trial in told]))
    rounds = _codes([trial.round for trial in told])
    arms, devices = _codes([trial.arm for trial in told]), _codes([trial.device_id for trial in told])
    by_round, by_arm, by_device = (np.zeros(codes.max() + 1) for codes in (rounds, arms, devices))
    for _ in range(_PASSES):
        by_round = _medians(gains - by_arm[arms] - by_device[devices], rounds)
        left = gains - by_round[rounds]
        by_device = _shrunk(left - by_arm[arms], devices)
        by_arm = _winsorised(left - by_device[devices], arms)
    left = gains - by_round[rounds] - by_device[devices]
    spread = _NORMAL_MAD * float(np.median(np.abs(left - by_arm[arms])))
    counts = _counts(arms, devices)
    return Effects(
        level=lasting(told, float(by_round[-1])),
        arms={
            arm: Estimate(float(by_arm[i]), spread / sqrt(counts[i]), int(counts[i]))
            for i, arm in enumerate(dict.fromkeys(trial.arm for trial in told))
        },
        spread=spread,
        residuals=_sums(told, left),
    )


def lasting(trials: Sequence[Trial], gain: float) -> float:
    """What of a round's gain is still there when the next one begins, by the devices that were asked again.

    A device gains by its own data too what the average with the others takes away again, whatever its arm.
    """
    newest, found = max(trial.round for trial in trials), []
    before: dict[str, Trial] = {}
    for trial in trials:
        earlier = before.get(trial.device_id)
        if earlier and earlier.round < trial.round and trial.round > newest - _LASTING_ROUNDS:
            found.append((earlier.loss - trial.loss) / (trial.round - earlier.round))
        before[trial.device_id] = trial
    kept = min(median(found), gain) if len(found) >= _LASTING_LEAST else gain
    return max(kept, 0.0)


def median_without(ordered: Sequence[float], one: float) -> float:
    """Median of sorted numbers but for one that is among them; 0 of none."""
    place = bisect_left(ordered, one)
    has = place < len(ordered) and ordered[place] == one
    count = len(ordered) - has
    if not count:
        return 0.0
    at = [i + (has and i >= place) for i in ((count - 1) // 2, count // 2)]
    return (ordered[at[0]] + ordered[at[1]]) / 2


def _codes(values: Sequence[Hashable]) -> Codes:
    """Values as places in the list of those that occur, the first one's 0."""
    places = {value: i for i, value in enumerate(dict.fromkeys(values))}
    return np.array([places[value] for value in values], np.intp)


def _clipped(gains: Doubles) -> Doubles:
    """Draw in what lies further from the median than any noise would."""
    middle = float(np.median(gains))
    far = _FAR * float(np.median(np.abs(gains - middle))) + 1e-9
    return np.clip(gains, middle - far, middle + far)


def _counts(arms: Codes, devices: Codes) -> Codes:
    """Trials of each arm, of one device no more than a few."""
    table = np.zeros((arms.max() + 1, devices.max() + 1), np.intp)
    np.add.at(table, (arms, devices), 1)
    counted: Codes = np.minimum(table, _DEVICE_TRIALS) if table.shape[1] > 2 else table
    return np.asarray(counted.sum(axis=1), np.intp)


def _medians(values: Doubles, groups: Codes) -> Doubles:
    return np.array([np.median(values[groups == i]) for i in range(groups.max() + 1)])


def _shrunk(values: Doubles, groups: Codes) -> Doubles:
    sums = np.bincount(groups, weights=values)
    return sums / (np.bincount(groups) + _DEVICE_PSEUDO)


def _winsorised(values: Doubles, groups: Codes) -> Doubles:
    return np.array([_drawn_in(values[groups == i]) for i in range(groups.max() + 1)])


def _drawn_in(values: Doubles) -> float:
    ordered = np.sort(values)
    cut = max(int(_OUTER * len(ordered)), 1) if len(ordered) > 2 else 0
    inner = np.clip(ordered, ordered[cut], ordered[len(ordered) - 1 - cut])
    return float(np.sum(inner)) / (len(inner) + _ARM_PSEUDO)


def _sums(told: Sequence[Trial], left: Doubles) -> dict[tuple[str, PolicySpec], tuple[float, int]]:
    found: dict[tuple[str, PolicySpec], tuple[float, int]] = {}
    for trial, value in zip(told, left.tolist(), strict=True):
        total, count = found.get((trial.device_id, trial.arm), (0.0, 0))
        found[trial.device_id, trial.arm] = total + value, count + 1
    return found
