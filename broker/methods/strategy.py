"""A strategy combines the updates of a round as they come, in exact sums; more devices do not take more memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.exact_sums import Sums, Values
from fleetune.device_runtime.arrays import Arrays, Indices
from fleetune.device_runtime.errors import WireError

WEIGHT_MAX = 2**29
"""Largest weight of one update: its product with a float32 is exact in float64."""
TOTAL_WEIGHT_MAX = 2**41
VALUE_MAX = 2.0**20
"""Largest magnitude of one value that is believed; with it no sum can overflow."""


class Update(NamedTuple):
    """What one device has learned."""

    values: Values
    """By tensor; those that it did not touch are absent."""
    reference: Arrays
    """The version that it starts from; not to be written."""
    weight: int
    """Number of samples."""
    staleness: int = 0
    """How many versions were made since that one; 0 where rounds wait for their devices."""
    rows: Mapping[str, Indices] = {}
    """By tensor of a LoRA pair which components ``values`` holds of it, ascending; the first ones where it says none."""
    device_id: str = ""
    """Whose it is."""
    is_held: bool = False
    """Whether it was held to a bound of its round: it was found plausible before that."""


class Bound(NamedTuple):
    """How an update that is beyond the bounds of its round counts."""

    weight: int
    scale: float
    """Of what it moves; 1 for as it is, 0 for an update that is left out."""
    times: float
    """How many times the middle length of the round it was."""
    agreement: float | None = None
    """Cosine with where the others go, if it is left out for pointing against them."""


class Gathered(NamedTuple):
    """A round at its closing."""

    lost: tuple[str, ...]
    """Devices that were asked and have sent nothing."""
    updates: Callable[[], Iterator[Update]]
    """All updates that came and were added, held to the bounds of the round, one in memory at a time; may be asked for more than
    once."""
    reference: Arrays
    """The newest version; not to be written."""
    version: int
    """That is made of them."""
    outliers: float = 0.0
    """Share of the updates that the job takes to be wrong."""


class StandIn(NamedTuple):
    """What a strategy has in the place of lost updates."""

    updates: Iterable[Update]
    """To be added beside those that came, before ``finish``."""
    state: Arrays
    """The strategy's, for ``finish``."""


class Strategy(NamedTuple):
    """How a round's updates become the next version; ``add`` may reuse the sums' arrays."""

    init: Callable[[Arrays], Sums]
    """(reference) -> sums"""
    add: Callable[[Sums, Update], Sums]
    """(sums, update) -> sums; WireError, and nothing added, if implausible"""
    finish: Callable[[Sums, Arrays, Arrays], tuple[Arrays, Arrays]]
    """(sums, reference, state) -> (new version, float32; state); the state crosses rounds, empty at first"""
    stand_in: Callable[[Gathered, Arrays], StandIn] | None = None
    """(round, state) -> what stands in for lost updates; None to leave them out"""
    choose: Callable[[Gathered], Arrays] | None = None
    """(round) -> new version, float32, from all updates at once, in the place of sums; None for a strategy that needs none"""
    length: Callable[[Update], float] | None = None
    """(update) -> how far it goes; None: the norm of what it moves"""
    direction: Callable[[Update], Mapping[str, NDArray[np.float64]]] | None = None
    """(update) -> what shows where it goes, of one round alone; None: what it moves, and where earlier rounds went counts too"""
    hold: Callable[[Update, Bound], Update] | None = None
    """(update, bound) -> as it counts; None: its weight and what it moves are cut"""


def init_sums(reference: Arrays) -> Sums:
    """Sums of nothing, for the tensors of ``reference``."""
    return Sums({name: value.shape for name, value in reference.items()})


def add_values(sums: Sums, update: Update) -> Sums:
    """Add an update's values by its samples, whatever it starts from; WireError as :func:`add_to_sums`."""
    return add_to_sums(sums, update.values, update.weight)


def add_to_sums(sums: Sums, values: Values, weight: int, *, value_max: float = VALUE_MAX) -> Sums:
    """Add ``weight * values`` exactly (float32 values; others rounded once to float64), in place.

    ``value_max`` is the largest magnitude that is believed; times the weights of a round it must stay below 2**62.

    Raises:
        WireError: as :func:`check_values`; nothing has been added then.
    """
    largest = check_values(sums, values, weight, value_max=value_max)
    sums.add(values, weight, value_max=largest)
    return sums


def check_values(sums: Sums, values: Values, weight: int, *, value_max: float = VALUE_MAX) -> float:
    """Return the largest magnitude; WireError that lists every tensor, shape, weight or magnitude that cannot be right."""
    with np.errstate(invalid="ignore"):
        largest = {name: _largest(value) for name, value in values.items()}
    if problems := list(_problems(sums, values, weight, largest, value_max)):
        raise WireError("implausible update: " + "; ".join(problems))
    return max(largest.values(), default=0.0)


def _problems(
    sums: Sums, values: Values, weight: int, largest: Mapping[str, float], value_max: float
) -> Iterator[str]:
    if not 0 < weight <= WEIGHT_MAX:
        yield f"{weight} samples (expected 1 to {WEIGHT_MAX})"
    for name, value in values.items():
        if name not in sums.shapes:
            yield f"{name}: unknown tensor"
        elif value.shape != sums.shapes[name]:
            yield f"{name}: shape {list(value.shape)}, expected {list(sums.shapes[name])}"
        elif not largest[name] <= value_max:
            yield f"{name}: a value that is not finite or beyond {value_max:.0f}"
        elif sums.weights[name] + weight > TOTAL_WEIGHT_MAX:
            yield f"{name}: more than {TOTAL_WEIGHT_MAX} samples in one round"


def _largest(value: NDArray[np.floating[Any]]) -> float:
    """Largest magnitude; NaN if one is."""
    return max(float(value.max(initial=0.0)), -float(value.min(initial=0.0)))
