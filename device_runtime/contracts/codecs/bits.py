"""Small unsigned integers side by side in bytes: 1, 2, 4, 8 or 16 bits each, lowest bits first."""

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8] | NDArray[np.uint16]
WIDTHS = (1, 2, 4, 8, 16)
_FOLDS = {2: ("<u4", (0, 6, 12, 18), 0x03030303), 4: ("<u2", (0, 4), 0x0F0F)}
"""How so many bytes, each with one code, fold into one: the word that holds them, the shifts, and their mask."""


def packed_bits(codes: Codes, width: int) -> bytes:
    """Pack a flat array of codes below 2**width."""
    if width >= 8:
        return codes.astype(f"<u{width // 8}", copy=False).tobytes()
    small = codes.astype(np.uint8, copy=False)
    if width == 1:
        return np.packbits(small, bitorder="little").tobytes()
    word, shifts, _ = _FOLDS[width]
    if rest := -small.size % len(shifts):
        small = np.concatenate([small, np.zeros(rest, np.uint8)])
    words = small.view(word)
    folded = words.copy()
    for shift in shifts[1:]:
        folded |= words >> shift
    return folded.astype(np.uint8).tobytes()


def unpacked_bits(data: bytes | memoryview, width: int, count: int) -> Codes:
    """Unpack ``count`` codes of ``data``, which is :func:`size_of` them long."""
    if width >= 8:
        return np.frombuffer(data, f"<u{width // 8}", count=count)
    folded = np.frombuffer(data, np.uint8)
    if width == 1:
        return np.unpackbits(folded, count=count, bitorder="little")
    word, shifts, mask = _FOLDS[width]
    wide = folded.astype(word)
    words = wide.copy()
    for shift in shifts[1:]:
        words |= wide << shift
    words &= mask
    return words.view(np.uint8)[:count]


def size_of(count: int, width: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * width // 8)
