"""What a traffic planner is: what it chooses for each device, and the three functions that it consists of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.tasks import Outcome, Packing, Task
from fleetune.device_runtime.contracts.work import LocalWork


class Carriage(NamedTuple):
    """How one device's transfers are packed, and why."""

    work: LocalWork
    """That of its task, with the up codec, and the batch size where the planner wants another."""
    down: Packing | None = None
    """None: as the job says."""
    reason: str = ""
    """A few words for people."""


class Traffic(NamedTuple):
    """How transfers are packed. What is chosen is recorded before it is offered: a restart asks for the very same.

    After a restart the outcomes of the whole job are learned again, in the order in which they came: a choice is a function of
    the settings, of the outcomes before it, of the devices that are asked at once, and of the deadline: all are recorded.
    """

    init: Callable[[Settings], Any]
    """(job) -> state"""
    choose: Callable[[Any, Sequence[Task], float], list[Carriage]]
    """(state, tasks of the devices that are asked at once, seconds that the round has or 0) -> one for each; the state stays"""
    learn: Callable[[Any, Outcome], Any]
    """(state, an accepted update or a declined task) -> state; the one given is used up"""
    is_fixed: bool = False
    """Whether it leaves all as the job says."""
    chooses: tuple[str, ...] = ()
    """Fields of the job or its work that it chooses itself, and that are to be left out."""
    hears_labels: bool = False
    """Whether it has a use for label histograms."""
