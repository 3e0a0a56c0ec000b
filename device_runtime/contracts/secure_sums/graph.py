"""Who masks with whom: places on a ring, drawn by the aggregator, and the nearest ones on either side.

Source: the Harary graph under a random order of Bell et al. (SecAgg+), ACM CCS 2020, section 3; with as many neighbours as there
are other devices it is the complete graph of Bonawitz et al., arXiv 1611.04482.
"""

import math

USUAL_DEGREE = 128
"""Neighbours of a device, where there are as many and the job says no other number: docs/privacy.md has what it withstands."""


def degree_of(size: int, asked: int) -> int:
    """Neighbours of each of ``size`` devices; ``asked`` 0 for the usual number."""
    wanted = asked or USUAL_DEGREE
    return size - 1 if wanted >= size - 1 else wanted - wanted % 2


def neighbours(place: int, size: int, degree: int) -> tuple[int, ...]:
    """Places of a device's neighbours, ascending."""
    if degree >= size - 1:
        return tuple(other for other in range(size) if other != place)
    steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
    return tuple(sorted((place + step) % size for step in steps))


def threshold_of(degree: int, share: float) -> int:
    """Shares that give a secret, of those that a device and its neighbours hold: always more than half."""
    holders = degree + 1
    return max(math.ceil(share * holders - 1e-9), holders // 2 + 1)
