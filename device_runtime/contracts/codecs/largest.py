"""The elements of largest magnitude."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def largest(magnitudes: NDArray[Any], num: int) -> NDArray[np.bool_]:
    """Which are the ``num`` largest of flat magnitudes, of equal ones the first; zeros are none."""
    if num >= magnitudes.size:
        taken: NDArray[np.bool_] = magnitudes > 0
        return taken
    words = magnitudes.view(f"u{magnitudes.itemsize}")  # in the same order, and quicker to compare
    least = np.partition(words, words.size - num)[words.size - num]
    taken = words >= max(least, 1)
    if more := max(0, int(np.count_nonzero(taken)) - num):
        taken[np.flatnonzero(words == least)[-more:]] = False
    return taken


def num_of(ratio: float, count: int) -> int:
    """The share ``ratio`` of ``count``, rounded up, at least one if there are any."""
    return min(count, max(1, math.ceil(ratio * count)))
