"""Floats by bytes of equal rank: their highest bytes repeat each other and are worth entropy-coding, the others are not."""

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.errors import WireError

HIGH = "values-high"
"""The part of the highest bytes."""
LOW = "values"


def planes(values: Array) -> dict[str, bytes]:
    """Parts of float16 or float32 values."""
    width = values.dtype.itemsize
    rows = values.view(np.uint8).reshape(-1, width)
    return {LOW: np.ascontiguousarray(rows[:, :-1].T).tobytes(), HIGH: rows[:, -1].tobytes()}


def joined_planes(low: bytes, high: bytes, dtype: str, count: int) -> Array:
    """The ``count`` values of two parts; WireError for a wrong length."""
    width = np.dtype(dtype).itemsize
    if (len(low), len(high)) != ((width - 1) * count, count):
        raise WireError(
            f"{len(low)} and {len(high)} bytes of values, expected {(width - 1) * count} and {count}"
        )
    rows = np.empty((count, width), np.uint8)
    rows[:, :-1] = np.frombuffer(low, np.uint8).reshape(width - 1, count).T
    rows[:, -1] = np.frombuffer(high, np.uint8)
    return rows.reshape(-1).view(dtype)
