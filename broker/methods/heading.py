"""Where a fleet goes: the sum of the directions of its updates, over rounds, and how far one update agrees with it.

Each update has one vote, its direction: neither its length nor the number of samples that it tells counts. Of the rounds before
a share is kept. So a round in which liars are many is judged by what the whole fleet did in the last ones. All vote, also those
that are left out for it: a heading that was wrong once comes right again.

Source: that updates are judged by what was learned before, and why single rounds do not do, is in Karimireddy et al., arXiv
2012.10333; by a cosine, in Cao et al. (FLTrust), arXiv 2012.13995, section 4, where it is one to an update of the server's
own. That the votes of all devices are in its place is ours.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
"""Sums that stand in the processor's cache while a product is added up; a power of two."""
_HELD_MAX = 2**12
"""Votes that are added in float64 before they go to whole numbers: below 2**53, at 2**40 a vote at most, no sum is rounded."""
_BLOCK = 2**14
"""Elements of which something is made at a time."""


class Difference:
    """``value - before`` in float64, made a block at a time: of a large tensor it is never held whole."""

    def __init__(self, value: NDArray[Any], before: NDArray[Any]) -> None:
        """Take both, which are not to be written; ValueError if their shapes differ."""
        _check_shapes(value, before)
        self.shape, self.size = value.shape, value.size
        self._value, self._before = value.reshape(-1), before.reshape(-1)

    def block(self, some: slice, out: Doubles) -> Doubles:
        """Write these elements of it to ``out``, and return that."""
        np.subtract(self._value[some], self._before[some], out=out, dtype=np.float64)
        return out


Direction = Mapping[str, Doubles | Difference]
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
        self._held: dict[str, Doubles] = {}
        """The last votes, in whole numbers."""
        self._num_held = 0
        self._units: dict[str, NDArray[np.int64]] = {}
        """Those before, where they are many."""
        self._scaled = np.empty(_BLOCK)

    def add(self, direction: Direction, length: float) -> None:
        """Add an update's, as long as all others'; one that moves nothing has none."""
        if not length:
            return
        if self._num_held == _HELD_MAX:
            self._settle()
        self._num_held += 1
        scale = _UNIT / length
        for name, moved in direction.items():
            if name not in self._held:
                self._held[name] = np.zeros(moved.shape)
            _check_shapes(self._held[name], moved)
            held, block_of = self._held[name].reshape(-1), _blocks(moved)
            for start in range(0, moved.size, _BLOCK):
                some, scaled = slice(start, start + _BLOCK), self._scaled[: moved.size - start]
                np.multiply(block_of(some, scaled), scale, out=scaled)
                held[some] += np.rint(scaled, out=scaled)

    def take_back(self, direction: Direction, length: float) -> None:
        """Take a vote back, to the bit."""
        self.add(direction, -length)

    def total(self) -> Heading:
        """Their sum."""
        return Heading({name: self._with(name, None, 0.0) for name in self._held})

    def after(self, before: Heading, *, kept: float) -> Arrays:
        """Return the heading that the next round has: these and the share ``kept`` of the one before, float32."""
        names = sorted(self._held.keys() | before.tensors.keys())
        return {name: self._with(name, before.tensors.get(name), kept) for name in names}

    def _with(self, name: str, before: Floats | None, kept: float) -> Floats:
        """The votes on a tensor and a share of what was before, added up in float64."""
        held, units = self._held.get(name), self._units.get(name)
        shape = before.shape if before is not None else self._held[name].shape
        found = np.empty(shape, np.float32)
        flat = found.reshape(-1)
        for start in range(0, flat.size, _BLOCK):
            some = slice(start, start + _BLOCK)
            votes: Any = 0.0 if held is None else held.reshape(-1)[some]
            if units is not None:
                votes = units.reshape(-1)[some] + votes.astype(np.int64)
            old = kept * np.asarray(before.reshape(-1)[some], np.float64) if before is not None else 0.0
            flat[some] = old + votes / _UNIT
        return found

    def _settle(self) -> None:
        """Have the last votes join those before."""
        for name, held in self._held.items():
            if name not in self._units:
                self._units[name] = np.zeros(held.shape, np.int64)
            units, flat = self._units[name].reshape(-1), held.reshape(-1)
            for start in range(0, flat.size, _BLOCK):
                some = slice(start, start + _BLOCK)
                units[some] += flat[some].astype(np.int64)
            flat[:] = 0.0
        self._num_held = 0


def squared(value: NDArray[np.floating[Any]] | Difference) -> float:
    """Sum of the squares of all elements, in one order: the same bits everywhere."""
    return _product(value, value)


def _product(
    one: NDArray[np.floating[Any]] | Difference, other: NDArray[np.floating[Any]] | Difference
) -> float:
    """Element i joins lane i % _LANES, and the upper half of the lanes the lower one until one is left, in float64.

    ValueError if shapes differ.
    """
    _check_shapes(one, other)
    left_of, right_of = _blocks(one), _blocks(other)
    num_lanes = min(_LANES, 1 << max(0, one.size - 1).bit_length())
    lanes, products, moved = np.zeros(num_lanes), np.empty(num_lanes), np.empty(num_lanes)
    for start in range(0, one.size, _LANES):
        some, count = slice(start, start + _LANES), min(_LANES, one.size - start)
        left = left_of(some, moved[:count])
        product = products[:count]
        right = left if one is other else right_of(some, product)
        np.multiply(left, right, out=product, dtype=np.float64)
        lanes[:count] += product
    while num_lanes > 1:
        num_lanes //= 2
        lanes[:num_lanes] += lanes[num_lanes : 2 * num_lanes]
    return float(lanes[0])


def _blocks(one: NDArray[Any] | Difference) -> Callable[[slice, Doubles], NDArray[Any]]:
    """(which elements, room for them in float64) -> these elements."""
    if isinstance(one, Difference):
        return one.block
    flat = one.reshape(-1)
    if flat.dtype == np.float64:
        return lambda some, _: flat[some]
    return partial(_widened, flat)


def _widened(flat: NDArray[Any], some: slice, out: Doubles) -> Doubles:
    np.copyto(out, flat[some])  # quicker than arithmetic of two types
    return out


def _check_shapes(one: NDArray[Any] | Difference, other: NDArray[Any] | Difference) -> None:
    if one.shape != other.shape:
        raise ValueError(f"elements of one and the other need one shape, got {one.shape} and {other.shape}")
