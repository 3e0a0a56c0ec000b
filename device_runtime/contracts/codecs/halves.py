"""To float16 and back, as IEEE 754 rounds, by whole vectors: numpy converts one element at a time, subnormal ones slowest."""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Floats, Indices
from fleetune.device_runtime.errors import WireError

Halves = NDArray[np.float16]
_F = TypeVar("_F", np.float32, np.float64)
_PIECE = 2**16
"""Elements worked on at a time: what fits a cache."""
_INFINITE = 0x7C00
"""Bits of a half."""
_LEAST_NORMAL = 0x0400
"""Bits of the smallest half that is not subnormal."""
_TOO_LARGE = 65520.0
"""Least magnitude that rounds to infinity."""


_REBIASED = (127 - 15) << 23
"""What the exponents of a float32 and of a half differ by, where the float32 has it."""


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
    if word == "<u4" and (small := _few(sums < np.array(2.0**-14, "<f4").view(word))) is not None:
        _round_normal(sums, signs, halves)
        halves[small] = values[small].astype("<f2").view("<u2")
        wide[small] = halves[small].view("<f2")
        return True
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


def _few(is_small: NDArray[np.bool_]) -> Indices | None:
    """Places of what a half has to be subnormal for; None for more than one of 32, which numpy would be slower to convert."""
    return np.flatnonzero(is_small) if 32 * np.count_nonzero(is_small) <= is_small.size else None


def _round_normal(bits: NDArray[np.uint32], signs: NDArray[np.uint32], halves: NDArray[np.uint16]) -> None:
    """Write the bits of halves, and over ``bits``, of magnitudes that no half has to be subnormal for, what they are worth."""
    odd = bits >> 13
    odd &= 1
    odd += 0xFFF
    bits += odd
    bits &= 0xFFFFE000
    counts = np.right_shift(bits, 13, out=odd)
    counts -= _REBIASED >> 13
    bits |= signs
    signs >>= 16
    counts |= signs
    halves[:] = counts


def _widen_normal(
    magnitudes: NDArray[np.uint16], signs: NDArray[np.uint16], bits: NDArray[np.uint32]
) -> None:
    """Write the bits of float32 of halves none of which is subnormal, infinite or not a number."""
    bits[:] = magnitudes
    bits <<= 13
    bits += _REBIASED
    shifted = signs.astype("<u4")
    shifted <<= 16
    bits |= shifted


def _widen(halves: Array, wide: Floats) -> None:
    """Write the values of halves, as :func:`_round` backwards."""
    bits, words = wide.view("<u4"), halves.view("<u2")
    magnitudes = words & np.uint16(0x7FFF)
    small = None if magnitudes.max(initial=0) >= _INFINITE else _few(magnitudes < _LEAST_NORMAL)
    if small is not None:
        _widen_normal(magnitudes, words & np.uint16(0x8000), bits)
        wide[small] = halves[small]
        return
    bits[:] = words
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
