"""How long an arm takes a device: the device's pace times the arm's cost, both learned from the rounds of the whole fleet.

What an arm costs beside another is much the same on all devices. So a device that trained only what its hidden cache made cheap
is not taken for a quick one: others have shown how cheap that is. Ours.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from math import isfinite
from statistics import median
from typing import NamedTuple, TypeVar

K = TypeVar("K", bound=Hashable)

_PASSES = 4
_PRIOR_TRIALS = 2.0
"""An arm's cost counts as measured so many times before it was."""


class Timed(NamedTuple):
    """What a device took for an arm."""

    device_id: str
    arm: Hashable
    seconds: float


class Paces(NamedTuple):
    """Paces and costs; a product of the two is seconds."""

    by_device: Mapping[str, float]
    by_arm: Mapping[Hashable, float]
    """Only of arms that were tried."""
    middle: float
    """Pace of the middle device; 0 if nothing is known."""

    def cost(self, arm: Hashable, prior: float) -> float:
        """Of an arm; ``prior`` if nobody has tried it."""
        return self.by_arm.get(arm, prior)

    def seconds(self, device: str, arm: Hashable, prior: float) -> float:
        """Seconds to be expected; ``prior`` is the cost of an arm that nobody has tried."""
        return self.by_device.get(device, self.middle) * self.cost(arm, prior)


def paces(told: Sequence[Timed], priors: Mapping[Hashable, float]) -> Paces:
    """Part seconds into paces and costs, in turns.

    Args:
        told: finite, above 0.
        priors: cost of each arm in ``told`` before it was tried; 0 for one of which nothing is known.
    """
    told = [one for one in told if isfinite(one.seconds) and one.seconds > 0]
    costs = {one.arm: priors[one.arm] for one in told}
    if not any(costs.values()):
        costs = dict.fromkeys(costs, 1.0)
    counts = Counter(one.arm for one in told)
    by_device: dict[str, float] = {}
    for _ in range(_PASSES):
        by_device = _medians((one.device_id, one.seconds / costs[one.arm]) for one in told if costs[one.arm])
        found = _medians(
            (one.arm, one.seconds / by_device[one.device_id]) for one in told if one.device_id in by_device
        )
        costs = {arm: _cost(priors[arm], found.get(arm, 0.0), counts[arm]) for arm in costs}
    known = {arm: cost for arm, cost in costs.items() if cost}
    return Paces(by_device, known, median(by_device.values()) if by_device else 0.0)


def _medians(pairs: Iterable[tuple[K, float]]) -> dict[K, float]:
    found: dict[K, list[float]] = defaultdict(list)
    for key, value in pairs:
        found[key].append(value)
    return {key: median(values) for key, values in found.items()}


def _cost(prior: float, found: float, count: int) -> float:
    """Of an arm without a prior what was found, 0 if nothing was."""
    if not prior or not found:
        return prior or found
    return (_PRIOR_TRIALS * prior + count * found) / (_PRIOR_TRIALS + count)
