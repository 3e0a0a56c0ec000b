"""The round for the head: sums by class of every device, added exactly, become the head of the next version.

Source: FedNCM, arXiv 2306.03937, section 3. The result does not depend on which device holds which sample.
"""

import math
from collections.abc import Iterator

import numpy as np

from fleetune.broker.methods.exact_sums import Sums, Values
from fleetune.broker.methods.strategy import (
    Bound,
    Strategy,
    Update,
    add_to_sums,
    init_sums,
)
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead, blank_sums
from fleetune.device_runtime.contracts.codecs.codec import Doubles
from fleetune.device_runtime.contracts.short_floats import shortened
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.methods.class_means import class_mean_head

SUM_MAX = 2.0**40
"""Largest magnitude of one sum that is believed; of a million devices none overflows."""
_ROUNDING = 1e-3
"""How far sums in float32 may be from what their squares allow, as a share of it."""


HEAD_BITS = 10
"""Of the significand of a head that is rounded: half precision's."""


def class_mean(head: ClassHead, *, is_short: bool = False) -> Strategy:
    """Put the class means of all updates in the place of ``head``; what else an adapter holds stays.

    Args:
        head: names.
        is_short: round them to the version before in their lowest bits: their difference, to the bit, is half as long.
    """

    def init(reference: Arrays) -> Sums:
        return init_sums(blank_sums(*reference[head.weight].shape))

    def add(sums: Sums, update: Update) -> Sums:
        problems = [] if update.is_held else [*_problems(sums, update.values, update.weight)]
        if problems:
            raise WireError("implausible class means: " + "; ".join(problems))
        return add_to_sums(sums, update.values, 1, value_max=SUM_MAX)

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        made = class_mean_head({name: sums.total(name) for name in sums.shapes}, head)
        if is_short:
            made = {name: shortened(value, reference[name], HEAD_BITS) for name, value in made.items()}
        return {name: made.get(name, value) for name, value in reference.items()}, state

    return Strategy(init, add, finish, length=_length, direction=_direction, hold=_held)


def _length(update: Update) -> float:
    """Root mean square length of a sample's features."""
    squares, counts = (np.asarray(update.values[name], np.float64) for name in (SQUARES, COUNTS))
    return math.sqrt(float(np.cumsum(squares)[-1]) / float(np.cumsum(counts)[-1]))


def _direction(update: Update) -> dict[str, Doubles]:
    """The sums of features: of devices that share classes they point alike, of those that share none at right angles."""
    return {SUMS: np.asarray(update.values[SUMS], np.float64)}


def _held(update: Update, bound: Bound) -> Update:
    """Count fewer samples, with shorter features; of a class less than one sample may be left."""
    share, scale = bound.weight / update.weight, bound.scale
    factors = {SUMS: share * scale, COUNTS: share, SQUARES: share * scale**2}
    values = {
        name: np.multiply(value, factors[name], dtype=np.float64) for name, value in update.values.items()
    }
    return update._replace(values=values, weight=bound.weight, is_held=True)


def _problems(sums: Sums, values: Values, num_samples: int) -> Iterator[str]:
    """Why sums cannot be those of ``num_samples`` samples; a shape, NaN or size that is wrong ``add_to_sums`` finds."""
    if missing := sorted(sums.shapes.keys() - values.keys()):
        yield f"{', '.join(missing)}: missing"
        return
    if any(values[name].shape != shape for name, shape in sums.shapes.items()):
        return
    totals, counts, squares = (np.asarray(values[name], np.float64) for name in (SUMS, COUNTS, SQUARES))
    if np.any(counts < 0) or np.any(counts != np.rint(counts)):
        yield f"{COUNTS}: a number that is negative or not whole"
    elif not 0 < counts.sum() <= num_samples * (1 + _ROUNDING):
        yield f"{COUNTS}: {counts.sum():.0f} samples with a class, of {num_samples}"
    with np.errstate(over="ignore", invalid="ignore"):
        is_met = np.square(totals).sum(1) <= counts * squares * (1 + _ROUNDING) + _ROUNDING**3
    if not np.all(is_met):
        yield f"{SUMS}: longer than {SQUARES} allow"
