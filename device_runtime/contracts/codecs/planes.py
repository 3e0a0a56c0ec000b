"""Floats by bytes of equal rank: their highest bytes repeat each other and are worth entropy-coding, the others are not."""

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.errors import WireError

LOW, HIGH = "values", "values-high"
"""Parts: all but the highest byte of each value, rank by rank but for the two lowest of a float32; and the highest bytes."""


def planes(values: Array) -> dict[str, bytes]:
    """Parts of float16 or float32 values."""
    if values.dtype.itemsize == 2:
        halves = values.view("<u2")
        return {LOW: halves.astype(np.uint8).tobytes(), HIGH: (halves >> 8).astype(np.uint8).tobytes()}
    words = values.view("<u4")
    low = words.astype("<u2").tobytes() + (words >> 16).astype(np.uint8).tobytes()
    return {LOW: low, HIGH: (words >> 24).astype(np.uint8).tobytes()}


def joined_planes(low: bytes, high: bytes, dtype: str, count: int) -> Array:
    """The ``count`` values of two parts; WireError for a wrong length."""
    width = np.dtype(dtype).itemsize
    if (len(low), len(high)) != ((width - 1) * count, count):
        raise WireError(
            f"{len(low)} and {len(high)} bytes of values, expected {(width - 1) * count} and {count}"
        )
    top = np.frombuffer(high, np.uint8)
    if width == 2:
        halves = top.astype("<u2") << 8
        halves |= np.frombuffer(low, np.uint8)
        return halves.view(dtype)
    words = top.astype("<u4") << 8
    words |= np.frombuffer(low, np.uint8, offset=2 * count)
    words <<= 16
    words |= np.frombuffer(low, "<u2", count=count)
    return words.view(dtype)
