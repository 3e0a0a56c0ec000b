"""Where a fleet goes: the sum of the directions of its updates, over rounds, and how far one update agrees with it.

Each update has one vote, its direction: neither its length nor the number of samples that it tells counts. Of the rounds before
a share is kept. So a round in which liars are many is judged by what the whole fleet did in the last ones. All vote, also those
that are left out for it: a heading that was wrong once comes right again.

Source: that updates are judged by what was learned before, and why single rounds do not do, is in Karimireddy et al., arXiv
2012.10333; by a cosine, in Cao et al. (FLTrust), arXiv 2012.13995, section 4, where it is one to an update of the server's
own. That the votes of all devices are in its place is ours.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays, Floats
from fleetune.device_runtime.contracts.codecs.codec import Doubles

AGAINST = 0.05
"""Cosine: an update that points further than this against the others is left out, if they agree closely or it was before."""
SPREADS = 4.0
"""An update is left out only if its cosine is so many standard deviations below the middle one of the last rounds.

Where the devices of a fleet learn different things, honest ones point against each other."""
RECENT_MAX = 64
"""Cosines of earlier updates that are kept for that."""
ELEMENTS_MIN = 6_400
"""Of fewer a direction tells nothing: by chance alone, cosines of so many have a standard deviation of a quarter of AGAINST."""
CLIENTS_MIN = 5
"""In jobs of fewer devices a round nobody's direction is looked at: among three or four, two that go another way may be right."""
TURNED = 0.6
"""Where more than this share of a round points against the heading, the fleet has turned: the round is judged by itself."""
_UNIT = 2.0**40
"""Votes are whole numbers of this part of a direction: their sum is the same bits in any order, for 2**22 updates."""

_LANES = 2**13
"""Sums that stand in the processor's cache while a product is added up."""

Direction = Mapping[str, Doubles]
"""What an update moves, by tensor, in the shape of the whole tensor: zeros where it holds nothing."""


def least_agreement(cosines: Sequence[float]) -> float:
    """Return the cosine below which an update is left out: -AGAINST, or less where the fleet's own are spread.

    Args:
        cosines: of the round, and of the last ones before it.

    Source: the median of absolute deviations as a deviation, and a number of them as a bound, are in Iglewicz and Hoaglin, How
    to Detect and Handle Outliers, 1993, section 3.3. To look at the upper half alone is ours: liars are in the lower one.
    """
    middle = median(cosines) if cosines else -1.0
    if middle < -AGAINST:  # most go back: what was before them tells, not how they are spread
        return -AGAINST
    deviation = 1.4826 * median(one - middle for one in cosines if one >= middle)
    return min(-AGAINST, middle - SPREADS * deviation)


class Heading:
    """Sum of directions, float32 by tensor; not to be written."""

    def __init__(self, tensors: Arrays) -> None:
        """Take what was kept; blank at first."""
        self.tensors: Mapping[str, Floats] = {n: np.asarray(v, np.float32) for n, v in tensors.items()}
        self._squares = {name: squared(value) for name, value in self.tensors.items()}

    def agreement(self, direction: Direction, length: float) -> float | None:
        """Cosine of an update with it, over the tensors that both have; 0 for no move, None if it says nothing of them."""
        names = sorted(self.tensors.keys() & direction.keys())
        square = sum(self._squares[name] for name in names)
        if not square:
            return None
        along = sum(_product(direction[name], self.tensors[name]) for name in names)
        return along / (length * math.sqrt(square)) if length else 0.0

    def agreement_of_others(self, direction: Direction, length: float) -> float:
        """Cosine of an update that is one of the sum with the rest of it; 0 where either is nothing."""
        if not length:
            return 0.0
        names = sorted(self.tensors.keys() & direction.keys())
        along = sum(_product(direction[name], self.tensors[name]) for name in names) / length
        square = sum(self._squares[name] for name in names) - 2 * along + 1
        return (along - 1) / math.sqrt(square) if square > 1 / _UNIT else 0.0


class Votes:
    """Directions of a round's updates, added as they come."""

    def __init__(self) -> None:
        """Begin with none."""
        self._units: dict[str, NDArray[np.int64]] = {}

    def add(self, direction: Direction, length: float) -> None:
        """Add an update's, as long as all others'; one that moves nothing has none."""
        if not length:
            return
        for name, moved in direction.items():
            scaled = np.asarray(moved * (_UNIT / length))
            units = np.rint(scaled, out=scaled).astype(np.int64)
            if name in self._units:
                self._units[name] += units
            else:
                self._units[name] = units

    def take_back(self, direction: Direction, length: float) -> None:
        """Take a vote back, to the bit."""
        self.add(direction, -length)

    def total(self) -> Heading:
        """Their sum."""
        return Heading({n: (units / _UNIT).astype(np.float32) for n, units in self._units.items()})

    def after(self, before: Heading, *, kept: float) -> Arrays:
        """Return the heading that the next round has: these and the share ``kept`` of the one before, float32."""
        names = sorted(self._units.keys() | before.tensors.keys())
        return {name: self._with(name, before, kept).astype(np.float32) for name in names}

    def _with(self, name: str, before: Heading, kept: float) -> Doubles:
        old = kept * np.asarray(before.tensors.get(name, np.float32(0)), np.float64)
        return np.asarray(old + self._units[name] / _UNIT if name in self._units else old)


def squared(value: NDArray[np.floating[Any]]) -> float:
    """Sum of the squares of all elements, in one order: the same bits everywhere."""
    return _product(value, value)


def squared_distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return what :func:`squared` of their difference in float64 is, to the bit, without all of that in memory."""
    _check_shapes(one, other)
    left, right, lanes, moved = one.reshape(-1), other.reshape(-1), np.zeros(_LANES), np.empty(_LANES)
    for start in range(0, left.size, _LANES):
        some = slice(start, start + _LANES)
        count = min(_LANES, left.size - start)
        np.subtract(left[some], right[some], out=moved[:count], dtype=np.float64)
        moved[:count] *= moved[:count]
        lanes[:count] += moved[:count]
    return float(np.cumsum(lanes, out=lanes)[-1])


def _product(one: NDArray[np.floating[Any]], other: NDArray[np.floating[Any]]) -> float:
    """Element i joins lane i % _LANES, and lanes are added one after the other, in float64; ValueError if shapes differ."""
    _check_shapes(one, other)
    left, right, lanes, products = one.reshape(-1), other.reshape(-1), np.zeros(_LANES), np.empty(_LANES)
    for start in range(0, left.size, _LANES):
        some = slice(start, start + _LANES)
        count = min(_LANES, left.size - start)
        np.multiply(left[some], right[some], out=products[:count], dtype=np.float64)
        lanes[:count] += products[:count]
    return float(np.cumsum(lanes, out=lanes)[-1])


def _check_shapes(one: NDArray[Any], other: NDArray[Any]) -> None:
    if one.shape != other.shape:
        raise ValueError(f"elements of one and the other need one shape, got {one.shape} and {other.shape}")
