"""What a device may expect of an arm: its gain, its seconds, and the pace of the others."""

from math import isfinite, log, sqrt
from statistics import median

from fleetune.broker.methods.arms import Arm
from fleetune.broker.methods.bandit import Estimate, median_without
from fleetune.broker.methods.bandit_memory import (
    Memory,
    cost_before,
    cost_of,
    is_long,
    is_tail,
    newest_s,
    summary_of,
    timed_as,
)


def gain_at(memory: Memory, device: str, arm: Arm) -> float:
    """Gain to be expected: the device's own trials, and as many of the fleet as ``pseudo`` says."""
    found = summary_of(memory).effects
    fleet = found.arms[arm.policy].mean if arm.policy in found.arms else 0.0
    total, count = found.residuals.get((device, arm.policy), (0.0, 0))
    pseudo = memory.tuning.pseudo
    return found.level + (total + pseudo * fleet) / (count + pseudo)


def bonus(memory: Memory, device: str, arm: Arm) -> float:
    """What an arm may gain beyond what it seems to, for ``ucb``: less with each of the device's trials."""
    found = summary_of(memory).effects
    mine = sum(found.residuals.get((device, policy), (0.0, 0))[1] for policy in memory.known)
    _, count = found.residuals.get((device, arm.policy), (0.0, 0))
    return memory.tuning.optimism * found.spread * sqrt(log(2 + mine) / (1 + count))


def seconds_at(memory: Memory, device: str, arm: Arm, *, below: int = 0) -> float:
    """Seconds to be expected of a round: as the device took at this arm, or by its pace and the arm's cost; 0 if not known."""
    own = [
        t.seconds
        for t in memory.own.get(device, ())
        if (t.arm, t.below) == (arm.policy, below) and isfinite(t.seconds)
    ]
    if own:
        return median(own)
    return summary_of(memory).paces.seconds(device, timed_as(arm.policy, below), cost_before(arm, below))


def limit_s(memory: Memory, deepest: Arm, number: int, *, below: int = 0) -> float:
    """How long a device may take in a round whose deepest arm this is; 0 if nothing is known."""
    is_calm = below > 0 or is_long(memory) or is_tail(memory, number)
    patience = memory.tuning.patience if is_calm else memory.tuning.hurry
    return patience * summary_of(memory).paces.middle * cost_of(memory, deepest, below)


def pace_of(memory: Memory, device: str) -> float:
    """What the other devices' work takes; 0 if nothing is known."""
    mine = newest_s(memory.own.get(device, ()))
    return median_without(summary_of(memory).newest_s, mine)


def leading(memory: Memory) -> Estimate | None:
    """The best arm's gain of those tried enough, by what is sure of it."""
    found = summary_of(memory).effects.arms
    judged = [
        found[p] for p in memory.arms if p in found and found[p].num_trials >= memory.tuning.trials_least
    ]
    return max(judged, key=lambda one: one.mean - one.error, default=None)


def error_of(one: Estimate, other: Estimate) -> float:
    """Standard error of a difference."""
    return sqrt(one.error * one.error + other.error * other.error)
