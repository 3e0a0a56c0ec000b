"""To float16 and back, as IEEE 754 rounds, by whole vectors: numpy converts one element at a time, subnormal ones slowest."""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.errors import WireError

Halves = NDArray[np.float16]
_F = TypeVar("_F", np.float32, np.float64)
_PIECE = 2**16
"""Elements worked on at a time: what fits a cache."""
_INFINITE = 0x7C00
"""Bits of a half."""
_TOO_LARGE = 65520.0
"""Least magnitude that rounds to infinity."""


class _Layout(NamedTuple):
    """Of the bits of a float."""

    word: str
    mantissa: int
    bias: int


_LAYOUTS = {4: _Layout("<u4", 23, 127), 8: _Layout("<u8", 52, 1023)}


def halved(values: NDArray[_F], *, what: str, codec: str) -> tuple[Halves, NDArray[_F]]:
    """Round flat float32 or float64 values to the nearest float16, of two equally near to the even one.

    Returns:
        The halves, and the same in the dtype of ``values``.

    Raises:
        WireError: a magnitude that no float16 holds; says ``what`` does not fit which ``codec``.
    """
    halves, wide = np.empty(values.size, "<u2"), np.empty_like(values)
    for start in range(0, values.size, _PIECE):
        here = slice(start, start + _PIECE)
        if not _round(values[here], halves[here], wide[here]):
            raise WireError(f"cannot pack: {what} beyond 65504 does not fit {codec}")
    return halves.view("<f2"), wide


def widened(halves: Array) -> Floats:
    """Float32 of flat halves."""
    wide = np.empty(halves.size, "<f4")
    for start in range(0, halves.size, _PIECE):
        here = slice(start, start + _PIECE)
        _widen(halves[here], wide[here])
    return wide


def _round(values: NDArray[_F], halves: NDArray[np.uint16], wide: NDArray[_F]) -> bool:
    """Write the bits and the values of the halves; False if a magnitude is too large, or not a number.

    A power of two, ``unit``, is added whose last place is that of the half: the addition rounds, and the mantissa of the sum
    counts the last places.
    """
    word, mantissa, bias = _LAYOUTS[values.itemsize]
    words, sums = values.view(word), wide.view(word)
    signs = words & words.dtype.type(1 << (8 * values.itemsize - 1))
    np.bitwise_xor(words, signs, out=sums)
    if sums.max() >= np.array(_TOO_LARGE, values.dtype).view(word):
        return False
    units = sums & words.dtype.type((2 * bias + 1) << mantissa)
    np.maximum(units, (bias - 14) << mantissa, out=units)
    units += (mantissa - 10) << mantissa
    wide += units.view(values.dtype)
    counts = sums - units
    wide -= units.view(values.dtype)
    sums |= signs
    units >>= mantissa - 10
    counts += units
    counts -= (bias + mantissa - 24) << 10
    signs >>= 8 * values.itemsize - 16
    counts |= signs
    halves[:] = counts
    return True


def _widen(halves: Array, wide: Floats) -> None:
    """Write the values of halves, as :func:`_round` backwards."""
    bits = wide.view("<u4")
    bits[:] = halves.view("<u2")
    signs = bits & 0x8000
    bits ^= signs
    if bits.max() >= _INFINITE:
        wide[:] = halves
        return
    units = bits >> 10
    np.maximum(units, 1, out=units)
    bits += 1 << 10
    bits -= units << 10
    units += 125
    units <<= 23
    bits += units
    wide -= units.view("<f4")
    signs <<= 16
    bits |= signs
