"""Exact sums of weighted floats: the same bits in any order, in blocks that stay in a cache.

An element is added to the first limb that it fits as a whole, what is left of it to the next. Small values, as adapters have,
need one limb an update: limbs have room for many before what is too much in them is carried to the next higher one. What of a
limb is zero takes no memory, and nothing here takes more for large tensors than limbs and results.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Doubles = NDArray[np.float64]
Values = Mapping[str, NDArray[np.float32] | Doubles]
_LIMB_BITS = 50
_NUM_LIMBS = 4
_UNIT = 2.0**-_LIMB_BITS
_ROOM = 2.0**12
"""Of a limb, in units of the one above it: so much may be added before it is carried, and it stays below 2**63."""
_SMALL = _ROOM / 16
"""Largest element, weighted, that goes to the second limb at once."""
_BLOCK = 2**14
"""Elements worked on at a time."""
_TO_WHOLE = 1.5 * 2**52
"""Added to a number below 2**51 it rounds it, ties to even, and leaves the whole number in the lower bits of the sum."""
_ITS_BITS = int(np.float64(_TO_WHOLE).view(np.int64))


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
        self._filled = 0.0
        """Of _ROOM, by what was added since limbs were carried."""
        self._scratch = np.empty((2, min(_BLOCK, ends[-1])))
        self._units = np.empty(min(_BLOCK, ends[-1]), np.int64)
        self._is_whole = np.empty(min(_BLOCK, ends[-1]), np.bool_)

    def add(self, values: Values, weight: int, *, value_max: float) -> None:
        """Add ``weight * values``: of float32 values exactly; others are rounded once to float64, and to 2**-150.

        ``value_max`` is the largest magnitude among them; times the weights of all that is added it must stay below 2**61.
        """
        first = int(weight * value_max <= _SMALL)
        filling = max(1.0, weight * value_max) if first else 1.0
        if self._filled + filling > _ROOM:
            self._carry()
        self._filled += filling
        while len(self._limbs) <= first:
            self._limbs.append(self._blank())
        scale = weight / _UNIT**first
        is_small = scale * value_max < 2**51
        for start, pieces in self._blocks(values):
            size = sum(piece.size for piece in pieces)
            x = self._scratch[0, :size]
            np.concatenate(pieces, out=x)
            x *= scale
            self._add(x, first, slice(start, start + size), is_small=is_small)
        for name in values:
            self.weights[name] += weight

    def limbs(self, name: str) -> list[NDArray[np.int64]]:
        """Carried limbs of one tensor, the highest first; not to be written."""
        if self._filled:
            self._carry()
        start, shape = self._starts[name], self.shapes[name]
        return [limb[start : start + math.prod(shape)].reshape(shape) for limb in self._limbs]

    def total(self, name: str) -> Doubles:
        """One tensor's sum, rounded once to float64."""
        return self._rounded(name, 1, np.dtype(np.float64))

    def mean(self, name: str, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """One tensor's sum by its weights, which must not be nothing: rounded to float64 and divided, then as ``dtype``."""
        return self._rounded(name, self.weights[name], np.dtype(dtype))

    def _rounded(self, name: str, weight: int, dtype: "np.dtype[Any]") -> NDArray[Any]:
        """A sum by a weight; it takes no memory but what it returns."""
        highest, *others = [limb.reshape(-1) for limb in self.limbs(name)]
        found = np.empty(highest.size, dtype)
        for start in range(0, found.size, _BLOCK):
            here = slice(start, start + _BLOCK)
            total = np.zeros(found[here].size)
            for limb in reversed(others):
                total += limb[here]
                total *= _UNIT
            total += highest[here]
            total /= weight
            found[here] = total
        return found.reshape(self.shapes[name])

    def _blank(self) -> NDArray[np.int64]:
        """A limb of zeros, which takes memory where it is written (zeros_like writes all of it)."""
        return np.zeros(self._limbs[0].size, np.int64)

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

    def _add(self, x: Doubles, first: int, here: slice, *, is_small: bool) -> None:
        """Add elements in units of limb ``first``, and what is left of them to lower ones; the array is written over."""
        whole, units, is_whole = self._scratch[1, : x.size], self._units[: x.size], self._is_whole[: x.size]
        for i in range(first, _NUM_LIMBS):
            if i == len(self._limbs):
                self._limbs.append(self._blank())
            if is_small:
                np.add(x, _TO_WHOLE, out=whole)
                np.subtract(whole.view(np.int64), _ITS_BITS, out=units)
                whole -= _TO_WHOLE
            else:
                np.rint(x, out=whole)
                np.copyto(units, whole, casting="unsafe")
            self._limbs[i][here] += units
            if np.equal(x, whole, out=is_whole).all():
                return
            x -= whole
            x /= _UNIT
            is_small = True  # at most half a unit was left

    def _carry(self) -> None:
        half = 1 << (_LIMB_BITS - 1)
        for start in range(0, self._limbs[0].size, _BLOCK):
            here = slice(start, start + _BLOCK)
            for higher, lower in zip(self._limbs[-2::-1], self._limbs[:0:-1], strict=True):
                carry = lower[here] + half
                carry >>= _LIMB_BITS
                if not carry.any():
                    continue
                higher[here] += carry
                carry <<= _LIMB_BITS
                lower[here] -= carry
        self._filled = 0.0
