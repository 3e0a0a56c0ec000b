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
    least = np.partition(magnitudes, magnitudes.size - num)[magnitudes.size - num]
    taken = magnitudes > least
    if least > 0 and (left := num - np.count_nonzero(taken)):
        taken[np.flatnonzero(magnitudes == least)[:left]] = True
    return taken


def num_of(ratio: float, count: int) -> int:
    """The share ``ratio`` of ``count``, rounded up, at least one if there are any."""
    return min(count, max(1, math.ceil(ratio * count)))
