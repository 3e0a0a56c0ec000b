"""FedAdapter: the trained suffix grows from one layer, when a deeper one gains more in the same time.

Source: Cai, Wu, Wang, Lin and Xu, arXiv 2205.10162, and its script: three groups of devices train for the same time as now
("shallow"), with one more layer ("deep") and with wider adapters ("wide"); the best goes on, and all inherit from it. Ours:
the groups train one model in the same rounds, and what is compared is their gain per second, which is their gain in equal
time. "wide" is twice the rank of the LoRA, up to the job's ``rank``; without a ``rank`` there are two groups. A depth grows
by a sixth of the layers.

A gain is the rise of the accuracy on what the device held back, where it tells that, else the fall of its training loss.
"""

from collections.abc import Sequence
from math import isfinite, nan
from statistics import median
from typing import NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.depths import assigned, is_time, num_layers_of, suffix
from fleetune.broker.tasks import Outcome

TRIAL = 3
"""Rounds after which the groups are compared."""
FIRST_RANKS = 4
"""The first rank is so much smaller than the job's."""
_BEFORE_AFTER = (("held_accuracy_before", "held_accuracy_after"), ("loss", "loss_first"))
"""Figures whose rise is a gain, the better ones first."""


class Width(NamedTuple):
    """What a group trains."""

    depth: int
    rank: int


class _State(NamedTuple):
    settings: Settings
    trial: int
    best: Width
    """Of the trials so far: what this one's shallow group trains."""
    gains: dict[Width, list[float]]
    """Gains per second of this trial's groups."""


def fedadapter() -> Configurator:
    """Choose by turns what is best so far, a deeper suffix and a wider one; after each trial the best of them is kept."""

    def init(settings: Settings) -> _State:
        return _State(settings, 0, Width(1, -(-settings.work.rank // FIRST_RANKS)), {})

    def choose(state: _State, candidate: Candidate) -> Choice:
        now, num_layers = _at(state, _trial(candidate.round)), num_layers_of(state.settings)
        groups = _groups(now)
        name, width = groups[(candidate.position + candidate.round) % len(groups)]
        work = assigned(now.settings, candidate, policy=suffix(width.depth, num_layers), rank=width.rank)
        rank = f", rank {width.rank}" if width.rank else ""
        return Choice(work, f"{name}: {width.depth} of {num_layers} layers{rank}")

    return Configurator(init, choose, _learned)


def _learned(state: _State, outcome: Outcome) -> _State:
    now = _at(state, _trial(outcome.work.rounds_before + 1))
    num_layers = num_layers_of(state.settings)
    gain, seconds = _gain(outcome), outcome.stats.get("seconds", 0.0)
    if not isfinite(gain) or not is_time(seconds):
        return now
    width = next((w for _, w in _groups(now) if _trains(outcome, w, num_layers)), None)
    if width is None:
        return now
    return now._replace(gains={**now.gains, width: [*now.gains.get(width, []), gain / seconds]})


def _at(state: _State, trial: int) -> _State:
    """The state in a later trial: the best group's width is inherited; the shallower one's where they are equal."""
    if trial <= state.trial:
        return state
    known = [width for _, width in _groups(state) if width in state.gains]
    best = max(known, key=lambda width: median(state.gains[width]), default=state.best)
    return _State(state.settings, trial, best, {})


def _groups(state: _State) -> Sequence[tuple[str, Width]]:
    """The groups of a trial that differ, the shallow one first."""
    num_layers, rank_max, (depth, rank) = num_layers_of(state.settings), state.settings.work.rank, state.best
    wanted = {
        "shallow": state.best,
        "deep": Width(min(depth + max(1, num_layers // 6), num_layers), rank),
        "wide": Width(depth, min(2 * rank, rank_max)),
    }
    return [(name, width) for name, width in wanted.items() if name == "shallow" or width != state.best]


def _gain(outcome: Outcome) -> float:
    """NaN where a device tells none."""
    for before, after in _BEFORE_AFTER:
        if before in outcome.stats and after in outcome.stats:
            return outcome.stats[after] - outcome.stats[before]
    return nan


def _trains(outcome: Outcome, width: Width, num_layers: int) -> bool:
    return (outcome.work.policy, outcome.work.rank) == (suffix(width.depth, num_layers), width.rank)


def _trial(round_number: int) -> int:
    return (round_number - 1) // TRIAL
