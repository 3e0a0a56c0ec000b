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

from fleetune.broker.methods.heading import AGAINST, Difference, squared
from fleetune.broker.methods.strategy import Bound, Update
from fleetune.device_runtime.contracts.lora import place_of

_LARGE = 2**20
"""Elements of a tensor that is looked through in blocks, as often as it is needed, and not held in float64."""
UPDATES_MIN = 3
"""Of a round that has a middle."""
FAR = 10.0
"""An update this many times longer than the middle one is far off: it is left out, and counts against its device."""


class Measured(NamedTuple):
    """What bounds go by."""

    weight: int
    length: float
    agreement: float | None = None
    """Cosine with where the others go; None if nobody looks."""
    least: float = -AGAINST
    """An update that agrees less points against the others."""


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

    Where agreement is looked at, an update that points against the others is left out, and both caps are those of a device that
    agrees as much as the middle one: with less agreement they are lower, down to 1 for none.

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
    shortest = least * length if length_cap else 0.0
    middle = _middle_agreement(measured)

    def bound(one: Measured) -> Bound:
        share = 1.0 if one.agreement is None else min(1.0, max(0.0, one.agreement / middle))
        most = int(_cap(weight_cap, share) * weight) if weight_cap else math.inf
        longest = _cap(length_cap, share) * length if length_cap and length else math.inf
        is_against = one.agreement is not None and one.agreement < one.least
        return Bound(
            weight=int(min(one.weight, most)),
            scale=0.0 if is_against or one.length < shortest else _scale(one.length, longest, far * length),
            times=one.length / length if length else 1.0,
            agreement=one.agreement if is_against else None,
        )

    found = {device: bound(one) for device, one in measured.items()}
    return {d: b for d, b in found.items() if b.scale < 1 or b.weight < measured[d].weight}


def direction_of(update: Update) -> dict[str, NDArray[np.float64] | Difference]:
    """Return what an update moves, float64 in the shapes of whole tensors: zeros where it holds nothing."""
    return {name: _moved(update, name) for name in update.values}


def length_of(update: Update) -> float:
    """Return the L2 norm of what an update moves, over all its tensors; summed in one order: the same bits everywhere."""
    return math.sqrt(
        sum(
            squared(Difference(value, update.reference[name][_place(update, name)]))
            for name, value in sorted(update.values.items())
        )
    )


def norm_of(tensors: Mapping[str, NDArray[Any] | Difference]) -> float:
    """Return the L2 norm of all elements together; summed in one order."""
    return math.sqrt(sum(squared(value) for _, value in sorted(tensors.items())))


def held(update: Update, bound: Bound) -> Update:
    """Return an update as its bound lets it count."""
    values = update.values
    if bound.scale < 1:
        values = {n: _towards(started(update, n), v, bound.scale) for n, v in values.items()}
    return update._replace(values=values, weight=bound.weight, is_held=True)


def started(update: Update, name: str) -> NDArray[np.float64]:
    """Return what a tensor of an update was before, float64, in its shape: the components that it holds."""
    return np.asarray(update.reference[name][_place(update, name)], np.float64)


def _cap(cap: float, share: float) -> float:
    """The cap of an update that agrees with the others by this share of what the middle one does."""
    return 1 + (cap - 1) * share


def _middle_agreement(measured: Mapping[str, Measured]) -> float:
    """The lower median of those that are known; where nobody agrees with anybody, what would be too little to tell."""
    known = [one.agreement for one in measured.values() if one.agreement is not None]
    return max(AGAINST, median_low(known)) if known else AGAINST


def _place(update: Update, name: str) -> Any:
    """Where in a tensor lies what an update holds of it."""
    if name in update.rows:
        return place_of(name, update.rows[name])
    return tuple(slice(size) for size in update.values[name].shape)


def _moved(update: Update, name: str) -> NDArray[np.float64] | Difference:
    value, whole = update.values[name], update.reference[name]
    if value.shape == whole.shape and name not in update.rows:
        if value.size > _LARGE:
            return Difference(value, whole)
        return np.asarray(np.subtract(value, whole, dtype=np.float64))
    moved = np.zeros(whole.shape)
    moved[_place(update, name)] = np.subtract(update.values[name], started(update, name), dtype=np.float64)
    return moved


def _scale(own: float, longest: float, far: float) -> float:
    if own <= longest:
        return 1.0
    return 0.0 if own > far else longest / own


def _towards(
    before: NDArray[np.float64], value: NDArray[np.floating[Any]], scale: float
) -> NDArray[np.float64]:
    return np.asarray(before + (value - before) * scale)
