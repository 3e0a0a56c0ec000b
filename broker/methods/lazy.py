"""How far the model has moved of late: what a lazy device holds its innovation to. It knows no codec and no device.

Source: LAQ, arXiv 1909.07588, whose code has WINDOW = 10 and xi_d = 0.8 / d.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fleetune.device_runtime.arrays import Array

WINDOW = 10


def move2(new: Mapping[str, Array], old: Mapping[str, Array]) -> float:
    """Squared L2 norm of the difference of two versions of the same tensors, summed by name."""
    total = 0.0
    for name in sorted(new):
        total += float(np.square(np.float64(new[name]) - np.float64(old[name])).sum())
    return total


def moved2(moves: Sequence[float], lazy: float) -> float:
    """Sum of the last moves, newest first, the d-th of them weighted by ``lazy`` / d."""
    total = 0.0
    for d, move in enumerate(moves[:WINDOW], 1):
        total += lazy / d * move
    return total
