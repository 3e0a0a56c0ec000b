"""Floats by bytes of equal rank: their highest bytes repeat each other and are worth entropy-coding, the others are not."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.errors import WireError

LOW, HIGH = "values", "values-high"
"""Parts: all but the highest byte of each value, rank by rank but for the two lowest of a float32; and the highest bytes."""


_PIECE = 2**16
_RANKS = {2: ((0, "<u1"), (8, "<u1")), 4: ((0, "<u2"), (16, "<u1"), (24, "<u1"))}
"""Shift and type of what is cut out of each value, by the bytes that it has."""


def planes(values: Sequence[Array]) -> dict[str, bytes]:
    """Parts of float16 or float32 values, all of one dtype."""
    width = values[0].dtype.itemsize
    ranks: list[list[bytes]] = [[] for _ in _RANKS[width]]
    for words in _cut(values, width):
        for rank, (shift, kind) in zip(ranks, _RANKS[width], strict=True):
            rank.append((words >> shift if shift else words).astype(kind).tobytes())
    *low, high = ranks
    return {LOW: b"".join(chain(*low)), HIGH: b"".join(high)}


def _cut(values: Sequence[Array], width: int) -> Iterator[NDArray[Any]]:
    """Bits, in pieces."""
    for piece in values:
        for start in range(0, piece.size, _PIECE):
            yield piece[start : start + _PIECE].view(f"<u{width}")


def joined_planes(low: bytes, high: bytes, dtype: str, count: int) -> Array:
    """The ``count`` values of two parts; WireError for a wrong length."""
    width = np.dtype(dtype).itemsize
    if (len(low), len(high)) != ((width - 1) * count, count):
        raise WireError(
            f"{len(low)} and {len(high)} bytes of values, expected {(width - 1) * count} and {count}"
        )
    top = np.frombuffer(high, np.uint8)
    if width == 2:
        halves = top.astype("<u2")
        halves <<= 8
        halves |= np.frombuffer(low, np.uint8)
        return halves.view(dtype)
    words = top.astype("<u4")
    words <<= 8
    words |= np.frombuffer(low, np.uint8, offset=2 * count)
    words <<= 16
    words |= np.frombuffer(low, "<u2", count=count)
    return words.view(dtype)
