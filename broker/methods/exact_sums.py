"""Exact sums of weighted floats: the same bits in any order, in blocks that stay in a cache, by whole vectors.

A float is parted into limbs by adding a power of two to it: the addition rounds to the limb's unit, and the mantissa of the sum
counts the units. So are bins in Demmel and Nguyen, Reproducible Summation (ARITH 2013); limbs of 50 bits in int64 are ours.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = Mapping[str, NDArray[np.float32] | NDArray[np.float64]]
TOTAL_MAX = 2.0**61
"""Of the magnitudes that are added to one element, together: beyond it a sum may overflow."""

_LIMB_BITS = 50
_UNITS = [2.0 ** (-_LIMB_BITS * i) for i in range(4)]
_ROUNDERS = [np.float64(1.5 * 2.0**52 * unit) for unit in _UNITS]
"""A float64 whose last place is the unit of a limb; with what is below 2**51 units beside it, too."""
_ADDITIONS_MAX = 4096
"""Before limbs are carried: 2**49 units each, they stay below 2**62."""
_BLOCK = 2**14
"""Elements worked on at a time."""


class Sums:
    """Weighted sums by tensor name, of one set of shapes.

    Limb i of an element is int64 in units of 2**(-50 i) and, once carried and but for i = 0, within ±2**49. That form is unique:
    equal sums are equal bits. Lower limbs exist once a value needs them, 8 bytes an element each, two or three in practice.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make sums of nothing; what adds to them sees to names, shapes and magnitudes (TOTAL_MAX)."""
        self.shapes = dict(shapes)
        self.weights = dict.fromkeys(shapes, 0)
        sizes = [math.prod(shape) for shape in shapes.values()]
        ends = [*accumulate(sizes, initial=0)]
        self._starts = dict(zip(shapes, ends, strict=False))
        self._limbs = [np.zeros(ends[-1], np.int64)]
        self._additions = 0
        """Since limbs were carried."""

    def add(self, values: Values, weight: int) -> None:
        """Add ``weight * values``: of float32 values exactly; others are rounded once to float64, and below 2**-150."""
        if self._additions == _ADDITIONS_MAX:
            self._carry()
        self._additions += 1
        room = np.empty((3, min(_BLOCK, self._limbs[0].size)))
        for start, pieces in self._blocks(values):
            size = sum(piece.size for piece in pieces)
            x, *scratch = room[:, :size]
            np.concatenate(pieces, out=x)
            x *= weight
            self._part(x, slice(start, start + size), *scratch)
        for name in values:
            self.weights[name] += weight

    def limbs(self, name: str) -> list[NDArray[np.int64]]:
        """Carried limbs of one tensor, the highest first; not to be written."""
        if self._additions:
            self._carry()
        start, shape = self._starts[name], self.shapes[name]
        return [limb[start : start + math.prod(shape)].reshape(shape) for limb in self._limbs]

    def total(self, name: str) -> NDArray[np.float64]:
        """One tensor's sum, rounded once to float64."""
        highest, *others = self.limbs(name)
        total = np.zeros(self.shapes[name])
        for limb in reversed(others):
            total += limb
            total *= _UNITS[1]
        total += highest
        return total

    def _blocks(self, values: Values) -> Iterator[tuple[int, Sequence[NDArray[Any]]]]:
        """Neighbouring elements, at most _BLOCK at a time: the place of the first, and flat pieces."""
        first = size = 0
        pieces: list[NDArray[Any]] = []
        for name in sorted(values, key=self._starts.__getitem__):
            flat = values[name].reshape(-1)
            for begin in range(0, flat.size, _BLOCK):
                piece, place = flat[begin : begin + _BLOCK], self._starts[name] + begin
                if pieces and (place != first + size or size + piece.size > _BLOCK):
                    yield first, pieces
                    pieces = []
                if not pieces:
                    first = place
                    size = 0
                pieces.append(piece)
                size += piece.size
        if pieces:
            yield first, pieces

    def _part(
        self, x: NDArray[np.float64], place: slice, high: NDArray[np.float64], counts: NDArray[np.float64]
    ) -> None:
        """Add elements limb by limb; all arrays are written over."""
        units = counts.view(np.int64)
        for i, rounder in enumerate(_ROUNDERS):
            if i == len(self._limbs):
                self._limbs.append(np.zeros_like(self._limbs[0]))
            np.add(x, rounder, out=high)
            np.subtract(high.view(np.int64), rounder.view(np.int64), out=units)
            self._limbs[i][place] += units
            high -= rounder
            x -= high
            if not x.any():
                return

    def _carry(self) -> None:
        half = 1 << (_LIMB_BITS - 1)
        for start in range(0, self._limbs[0].size, _BLOCK):
            here = slice(start, start + _BLOCK)
            for higher, lower in zip(self._limbs[-2::-1], self._limbs[:0:-1], strict=True):
                carry = lower[here] + half
                carry >>= _LIMB_BITS
                higher[here] += carry
                carry <<= _LIMB_BITS
                lower[here] -= carry
        self._additions = 0
