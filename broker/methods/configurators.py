"""Configurators choose the work of each device, and may learn from what came of it; three pure functions each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fleetune.broker.job import Settings, device_work
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.tables import Table


class Candidate(NamedTuple):
    """A device that is to be asked."""

    device_id: str
    round: int
    """From 1."""
    position: int
    """Place among those asked in the round, from 0."""


class Configurator(NamedTuple):
    """How work is chosen. What is chosen is recorded before it is offered: a restart asks for the very same.

    Draws, if any, come from the job's seed, the round and the position. After a restart the outcomes of the whole job are learned
    again, in the order in which they were accepted.
    """

    init: Callable[[Settings], Any]
    """(job) -> state"""
    choose: Callable[[Any, Candidate], LocalWork]
    """(state, device) -> its work, seed included"""
    learn: Callable[[Any, Outcome], Any]
    """(state, outcome of an accepted update) -> state"""


def fixed() -> Configurator:
    """Give all devices the job's own work, each with a seed of its own."""

    def choose(settings: Settings, candidate: Candidate) -> LocalWork:
        return device_work(settings, round_number=candidate.round, position=candidate.position)

    return Configurator(lambda settings: settings, choose, lambda settings, _: settings)


CONFIGURATORS: Table[Callable[[], Configurator]] = Table("configurator", {"fixed": fixed})
