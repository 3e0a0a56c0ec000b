"""What was chosen for whom, why, and what it brought: read from a job's store, and chosen once more from what it holds."""

from collections.abc import Iterator
from itertools import groupby, islice
from math import isfinite
from typing import Any

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.bandit import gain_of, seconds_of
from fleetune.broker.methods.configurators import CONFIGURATORS, Candidate, Configurator
from fleetune.broker.methods.traffic import TRAFFIC, laid_over
from fleetune.broker.store.store import Decided, Store
from fleetune.broker.tasks import Task, arm_of
from fleetune.device_runtime.contracts.work import ADAPTER


class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """One device in one round; a figure is None where the device did not tell it, or told nonsense."""

    round: int
    device: str
    arm: str
    reason: str
    gain: float | None = None
    """Loss taken off its held-out part."""
    accuracy_gain: float | None = None
    seconds: float | None = None
    """Of training."""
    reward: float | None = None
    """``gain`` a second; what the configurator compares also knows the pace of the others."""
    declined: str = ""
    """Why the device did not do it."""


def choices(store: Store) -> Iterator[Chosen]:
    """Every training task of a job, in the order in which they were chosen."""
    return (_chosen(decided) for decided in store.decided())


def replay(store: Store, settings: Settings) -> Iterator[tuple[Task, Task]]:
    """Choose anew by what was known at each time: (task as recorded, as chosen again), of rounds that train.

    They are the same however often an aggregator was killed: a choice is a function of the settings, of the outcomes before it,
    and of what is recorded with it.
    """
    configurator, traffic = CONFIGURATORS[settings.configurator](), TRAFFIC[settings.traffic]()
    state, carried = configurator.init(settings), traffic.init(settings)
    outcomes, learned = iter(store.outcomes()), 0
    for _, decided in groupby(store.decided(), _at_once):
        together = [*decided]
        for outcome in islice(outcomes, max(0, together[0].num_outcomes - learned)):
            learned += 1
            state, carried = configurator.taught(state, outcome), traffic.learn(carried, outcome)
        tasks = [one.task for one in together if one.task.work.learns == ADAPTER]
        again = [_chosen_again(configurator, state, task) for task in tasks]
        if tasks:
            deadline_s = tasks[0].plan.deadline_s if tasks[0].plan else 0.0
            yield from zip(tasks, laid_over(traffic, carried, again, deadline_s=deadline_s), strict=True)


def _at_once(decided: Decided) -> tuple[int, int]:
    """Tasks that have this in common were chosen at once."""
    task = decided.task
    return task.round, task.plan.together if task.plan else task.position


def _chosen_again(configurator: Configurator, state: Any, task: Task) -> Task:
    choice = configurator.choose(state, Candidate(task.device_id, task.round, task.position))
    assert choice.work is not None  # or there would be no task
    return task._replace(work=choice.work, reason=choice.reason, plan=None)


def _chosen(decided: Decided) -> Chosen:
    task, stats = decided.task, decided.stats or {}
    gain, seconds = _told(gain_of(stats)), _told(seconds_of(stats))
    before, after = stats.get("held_accuracy_before"), stats.get("held_accuracy_after")
    return Chosen(
        round=task.round,
        device=task.device_id,
        arm=arm_of(task.work),
        reason=task.reason,
        gain=gain,
        accuracy_gain=None if before is None or after is None else after - before,
        seconds=seconds,
        reward=gain / seconds if gain is not None and seconds else None,
        declined=decided.declined or "",
    )


def _told(value: float) -> float | None:
    return value if isfinite(value) else None
