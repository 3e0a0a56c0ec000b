"""Bounds on each update of a round, from the round's own middle: nobody weighs, or moves the model, much more than the others.

The middle is the lower median: fewer than half of the devices, whatever they say, cannot lift it above what honest ones have.
A round of one or two updates has no middle, and none is bounded: nobody can tell which of two is wrong.

Source: bounding an update's norm against those of a round is in Sun et al., arXiv 1911.07963, section 4, with a fixed bound; the
median in its place, the cap on weights and what happens beyond a bound are ours.
"""

import math
from collections.abc import Mapping
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.strategy import Bound, Update
from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.lora import place_of

UPDATES_MIN = 3
"""Of a round that has a middle."""
FAR = 10.0
"""An update this many times longer than the middle one is far off: it is left out, and counts against its device."""


class Measured(NamedTuple):
    """What bounds go by."""

    weight: int
    length: float


def bounds(
    measured: Mapping[str, Measured],
    *,
    weight_cap: float,
    length_cap: float,
    far: float = FAR,
    least: float = 0.0,
    floor: float = 0.0,
) -> dict[str, Bound]:
    """Return how the updates that are beyond a bound count, by device; the others count as they are.

    A weight beyond ``weight_cap`` times the middle one is cut to that, and a length beyond ``length_cap`` times the middle one.
    An update that is ``far`` off as well is left out: its scale is 0. A middle of zero bounds nothing.

    Args:
        measured: by device.
        weight_cap: 1 or more; 0 for no bound.
        length_cap: as well.
        far: in times the middle length.
        least: in times the middle length: a shorter one is left out.
        floor: the middle length counts as this at least: where most have nothing left to learn, the others still may.
    """
    if len(measured) < UPDATES_MIN:
        return {}
    weight = median_low([one.weight for one in measured.values()])
    length = max(floor, median_low([one.length for one in measured.values()]))
    most = int(weight_cap * weight) if weight_cap else math.inf
    longest = length_cap * length if length_cap and length else math.inf
    shortest = least * length if length_cap else 0.0
    found = {
        device: Bound(
            weight=int(min(one.weight, most)),
            scale=0.0 if one.length < shortest else _scale(one.length, longest, far * length),
            times=one.length / length if length else 1.0,
        )
        for device, one in measured.items()
    }
    return {d: b for d, b in found.items() if b.scale < 1 or b.weight < measured[d].weight}


def length_of(update: Update) -> float:
    """Return the L2 norm of what an update moves, over all its tensors; summed in one order: the same bits everywhere."""
    return math.sqrt(
        sum(_square(value, started(update, name)) for name, value in sorted(update.values.items()))
    )


def norm_of(tensors: Arrays) -> float:
    """Return the L2 norm of all elements together; summed in one order."""
    return math.sqrt(sum(_square(value, np.zeros(())) for _, value in sorted(tensors.items())))


def held(update: Update, bound: Bound) -> Update:
    """Return an update as its bound lets it count."""
    values = update.values
    if bound.scale < 1:
        values = {n: _towards(started(update, n), v, bound.scale) for n, v in values.items()}
    return update._replace(values=values, weight=bound.weight, is_held=True)


def started(update: Update, name: str) -> NDArray[np.float64]:
    """Return what a tensor of an update was before, float64, in its shape: the components that it holds."""
    whole = update.reference[name]
    if name in update.rows:
        return np.asarray(whole[place_of(name, update.rows[name])], np.float64)
    return np.asarray(whole[tuple(slice(size) for size in update.values[name].shape)], np.float64)


def _scale(own: float, longest: float, far: float) -> float:
    if own <= longest:
        return 1.0
    return 0.0 if own > far else longest / own


def _square(value: Array, before: Array) -> float:
    moved = np.subtract(value, before, dtype=np.float64).reshape(-1)
    return float(np.cumsum(moved * moved)[-1]) if moved.size else 0.0


def _towards(
    before: NDArray[np.float64], value: NDArray[np.floating[Any]], scale: float
) -> NDArray[np.float64]:
    return np.asarray(before + (value - before) * scale)
