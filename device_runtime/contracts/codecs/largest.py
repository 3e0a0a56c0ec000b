"""The elements of largest magnitude."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SAMPLE = 2048
"""Words of which a bracket is taken; of fewer, all are looked at."""
_MARGIN = 72
"""Words of the sample to either side: three standard deviations of a rank at least. Beyond them all are looked at."""


def largest(magnitudes: NDArray[Any], num: int) -> NDArray[np.bool_]:
    """Which are the ``num`` largest of flat magnitudes, of equal ones the first; zeros are none."""
    if num >= magnitudes.size:
        taken: NDArray[np.bool_] = magnitudes > 0
        return taken
    words = magnitudes.view(f"u{magnitudes.itemsize}")  # in the same order, and quicker to compare
    least = _of_rank(words, words.size - num)
    taken = words >= max(least, 1)
    if more := max(0, int(np.count_nonzero(taken)) - num):
        taken[np.flatnonzero(words == least)[-more:]] = False
    return taken


def _of_rank(words: NDArray[Any], rank: int) -> Any:
    """Return the word that so many others sort before.

    What a sample brackets is counted, and the few within are sorted apart: half of the time of a partition of all.
    """
    sample = np.sort(words[:: max(1, words.size // _SAMPLE)])
    at = rank * sample.size // words.size
    low, high = sample[max(0, at - _MARGIN)], sample[min(sample.size - 1, at + _MARGIN)]
    is_within = words - low <= high - low  # unsigned: what is below ``low`` wraps beyond
    within = words.take(np.flatnonzero(is_within))
    place = rank - int(np.count_nonzero(words < low))
    if not 0 <= place < within.size:  # the sample does not stand for all
        within, place = words, rank
    return np.partition(within, place)[place]


def num_of(ratio: float, count: int) -> int:
    """The share ``ratio`` of ``count``, rounded up, at least one if there are any."""
    return min(count, max(1, math.ceil(ratio * count)))
