"""What a configurator is: whom it chooses for, what it chooses, and the three functions that it consists of."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import ADAPTER, LocalWork


class Candidate(NamedTuple):
    """A device that is to be asked."""

    device_id: str
    round: int
    """From 1."""
    position: int
    """Place among those asked in the round, from 0."""


class Choice(NamedTuple):
    """What a device is to do, and why."""

    work: LocalWork | None
    """Seed included; None: there is nothing that the device could do, and it is left out from now on."""
    reason: str = ""
    """A few words for people; empty where there was nothing to choose."""


class Configurator(NamedTuple):
    """How work is chosen. What is chosen is recorded before it is offered: a restart asks for the very same.

    Draws, if any, come from the job's seed, the round and the position. After a restart the outcomes of the whole job are learned
    again, in the order in which they came: a choice is a function of the settings and of the outcomes before it.
    """

    init: Callable[[Settings], Any]
    """(job) -> state"""
    choose: Callable[[Any, Candidate], Choice]
    """(state, device) -> its choice; the state stays as it is"""
    learn: Callable[[Any, Outcome], Any]
    """(state, an accepted update or a declined task) -> state; the one given is used up"""
    prepare: Callable[[Any, LocalWork], LocalWork] = lambda _, work: work
    """(state, work of the round for the head) -> that work, with what rounds after it need: which layers learn first, so that
    devices keep what flows into them, and what is held out."""
    hears_of_head: bool = False
    """Whether it is told of the round for the head too, where nothing is chosen: each device's ``seconds`` and ``samples``."""

    def taught(self, state: Any, outcome: Outcome) -> Any:
        """The state after an outcome of the job; the one given is used up, unless this configurator does not hear of it."""
        is_heard = outcome.work.learns == ADAPTER or self.hears_of_head
        return self.learn(state, outcome) if is_heard else state
