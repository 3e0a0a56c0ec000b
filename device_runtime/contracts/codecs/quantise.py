"""Elements in few bits, with one scale for each block of them, rounded at random so that their mean is right, or to the nearest.

Source: Alistarh et al., QSGD, arXiv 1610.02132 (stochastic rounding); Bernstein et al., signSGD, arXiv 1802.04434 (1 bit);
Vargaftik et al., DRIVE, arXiv 2105.08339 (its scale, ||x||^2 / ||x||_1; the bound of it is ours). Lloyd and Max (2 bits to the
nearest). Blocks, scales of 16 bits and the draws are ours.
"""

import math
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.codecs.bits import Codes, packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.draws import Key, words
from fleetune.device_runtime.errors import WireError

BLOCK = 128
"""Elements that share one scale, of all tensors together in the order of their names."""
LEAST, LARGEST = 2.0**-100, 2.0**100
"""Blocks whose largest magnitude is below the first travel as zeros; one beyond the second does not fit."""
_PIECE = 2**16
"""Elements worked on at a time, and drawn for under one key: what fits a cache."""
_SCALE = np.dtype("<u2")


class Quantised(NamedTuple):
    """Elements as they travel, and as whoever receives them has them."""

    codes: bytes
    scales: bytes
    conveyed: Floats


def quantise(flat: Floats, bits: int, name: str | None) -> Quantised:
    """Quantise float32 elements to codes of 1, 2, 3, 4, 8 or 16 bits.

    With 2 bits and more the expected value is the element itself, but for 2**-16 of a step (2**-9 with 8 bits); or each
    element goes to the nearest step, up from half of one, with half of the mean squared error. Then 2 bits have a scale of
    their own: of what is not zero of a block the mean magnitude, not the largest. With 1 bit it is its sign times one
    magnitude for its block.

    Args:
        flat: elements; what is conveyed is written over them.
        bits: of a code.
        name: goes into the seed of the draws, beside the scales; None to round to the nearest.

    Raises:
        WireError: a magnitude beyond ``LARGEST``.
    """
    pieces = [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
    scales = [_scales(piece, bits, is_mean=bits == 2 and name is None) for piece in pieces]
    told = b"".join(scale.tobytes() for scale in scales)
    seed = None if name is None else int(sha256(name.encode() + b"\0" + told).hexdigest()[:13], 16)
    codes = []
    for i, (piece, scale) in enumerate(zip(pieces, scales, strict=True)):
        blocks = _blocks(piece)
        key = None if seed is None else Key(seed, "rounding", i)
        found = _signs(blocks) if bits == 1 else _rounded(blocks, scale, bits, key)
        codes.append(packed_bits(found.reshape(-1)[: piece.size], _packed_width(bits)))
        piece[:] = _values(found, scale, bits, piece.size)
    return Quantised(b"".join(codes), told, flat)


def restore(codes: bytes | memoryview, scales: bytes, bits: int, count: int) -> Floats:
    """Return the elements that :func:`quantise` conveyed; WireError for a wrong length or a scale that cannot be."""
    width = _packed_width(bits)
    expected = size_of(count, width), _SCALE.itemsize * _num_blocks(count)
    if (len(codes), len(scales)) != expected:
        raise WireError(
            f"{len(codes)} bytes of values and {len(scales)} of scales, expected {expected[0]} and {expected[1]}"
        )
    stored = np.frombuffer(scales, _SCALE)
    wide = _wide(stored)
    if not ((wide >= 0) & (wide <= LARGEST)).all():
        raise WireError("a scale is negative, not finite or beyond 2**100")
    conveyed, content = np.empty(count, np.float32), memoryview(codes)
    for start in range(0, count, _PIECE):
        piece = conveyed[start : start + _PIECE]
        found: Codes = unpacked_bits(content[size_of(start, width) :], width, piece.size)
        piece[:] = _values(
            _blocks(found), stored[start // BLOCK :][: _num_blocks(piece.size)], bits, piece.size
        )
    return conveyed


def quantised_bytes(count: int, bits: int) -> int:
    """Bytes of the codes and scales of so many elements."""
    return size_of(count, _packed_width(bits)) + _SCALE.itemsize * _num_blocks(count)


def levels_of(bits: int) -> int:
    """Steps from zero to the scale."""
    return max(1, (1 << (bits - 1)) - 1)


def _packed_width(bits: int) -> int:
    """Bits that a code takes before it is entropy-coded: of three bits it lies in four."""
    return 4 if bits == 3 else bits


def _blocks(flat: NDArray[Any]) -> NDArray[Any]:
    """(blocks, BLOCK), the last one filled up with zeros."""
    if rest := -flat.size % BLOCK:
        flat = np.concatenate([flat, np.zeros(rest, flat.dtype)])
    return flat.reshape(-1, BLOCK)


def _scales(piece: Floats, bits: int, *, is_mean: bool) -> NDArray[np.uint16]:
    """The upper halves of float32s: largest magnitudes, rounded up, or means; 0 for less than LEAST."""
    magnitudes = np.abs(_blocks(piece))
    largest = magnitudes.view("<u4").max(axis=1).view("<f4")  # magnitudes are in the order of their bits
    if not (largest <= LARGEST / 2).all():
        raise WireError("cannot pack: a difference beyond 2**99 does not fit")
    found = largest
    if bits == 1:
        found = _even(magnitudes, np.minimum(piece.size - BLOCK * np.arange(len(magnitudes)), BLOCK))
    elif is_mean:
        found = _means_of_larger(magnitudes)
    found = np.where(largest < LEAST, np.float32(0), found)
    return ((found.view("<u4") + np.uint32(0xFFFF)) >> np.uint32(16)).astype(_SCALE)


def _even(magnitudes: Floats, sizes: NDArray[np.int64]) -> Floats:
    """Scales of signs with which a block moves as far in its own direction as it should, or 1.5 times the mean magnitude.

    With the mean magnitude, which has the least error, it falls short by a quarter or more, in all devices alike: sums of many
    do not mend that. Above twice the mean what is owed could grow from update to update.
    """
    sums = magnitudes.sum(axis=1)
    squares = np.square(magnitudes, dtype=np.float64).sum(axis=1)
    far = np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
    return np.asarray(np.minimum(far, 1.5 * sums.astype(np.float64) / sizes), np.float32)


def _means_of_larger(magnitudes: Floats) -> Floats:
    """Of each block the mean of those above half of that mean: the best level beside zero (Lloyd, Max), in two steps."""
    level = np.float32(1.4) * magnitudes.mean(axis=1)
    for _ in range(2):
        is_larger = (magnitudes > level[:, None] / 2).astype(np.float32)
        sums: Floats = np.einsum("bi,bi->b", magnitudes, is_larger)
        level = sums / np.maximum(is_larger.sum(axis=1), np.float32(1))
    return np.asarray(level, np.float32)


def _wide(scales: NDArray[np.uint16]) -> Floats:
    return (scales.astype("<u4") << np.uint32(16)).view("<f4")


def _signs(blocks: Floats) -> Codes:
    return (blocks >= 0).view(np.uint8)


def _rounded(blocks: Floats, scales: NDArray[np.uint16], bits: int, key: Key | None) -> Codes:
    """Codes from 0 to twice the levels: floor of element / step + draw / 2**16."""
    wide, levels = np.float64(_wide(scales)), levels_of(bits)
    # A hair less than exact, so that the largest element stays within the levels.
    factors = np.divide(levels * 2.0**16 * (1 - 2.0**-22), wide, out=np.zeros_like(wide), where=wide > 0)
    exact = np.float64 if bits == 16 else np.float32
    steps = np.multiply(blocks, factors[:, None].astype(exact), dtype=exact)
    whole = np.rint(steps, out=steps).astype(np.int32)  # with the draw at most 2**31 - 1
    whole += _draws(key, blocks.shape, bits)
    whole >>= 16
    if bits == 2:  # a scale may be less than the largest
        np.clip(whole, -levels, levels, out=whole)
    whole += levels
    codes: Codes = whole.astype(np.uint16 if bits == 16 else np.uint8)
    return codes


def _draws(key: Key | None, shape: tuple[int, ...], bits: int) -> NDArray[np.uint16] | int:
    """Integers from 0 to 2**16 - 1, two from each drawn word; the half of 2**16 for None.

    For 8 bits, whose steps are small, four from each word: the middles of 256ths, in half the time.
    """
    if key is None:
        return 2**15
    size = math.prod(shape)
    if bits != 8:
        return words(key, size // 2).astype("<u4", copy=False).view("<u2").reshape(shape)
    drawn = words(key, size // 4).astype("<u4", copy=False).view("u1").astype(np.uint16)
    drawn <<= 8
    drawn += 128
    return drawn.reshape(shape)


def _values(codes: Codes, scales: NDArray[np.uint16], bits: int, count: int) -> Floats:
    steps = _wide(scales) / np.float32(levels_of(bits))
    centred = codes.astype(np.float32)
    if bits == 1:
        centred += centred
    centred -= np.float32(levels_of(bits))
    centred *= steps[:, None]
    return centred.reshape(-1)[:count]


def _num_blocks(count: int) -> int:
    return -(-count // BLOCK)
