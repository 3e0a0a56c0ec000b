"""Carries out what a federation decides: on disk first, then on the wire."""

import logging
from collections.abc import Iterable, Sequence
from itertools import groupby

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.rounds.actions import (
    Action,
    Assign,
    Close,
    Dismiss,
    Enrol,
    Finish,
    Record,
    Repeat,
    Tell,
)
from fleetune.broker.service.meter import Meter
from fleetune.broker.service.outbound import Outbound
from fleetune.broker.service.streams import Streams
from fleetune.broker.service.versions import Versions
from fleetune.broker.store.store import AFTERWARDS, Store
from fleetune.broker.tasks import Mark, Task, arm_of, listed
from fleetune.device_runtime.contracts.wire import Finished, Offer
from fleetune.device_runtime.contracts.work import MASKED
from fleetune.device_runtime.network.complaints import Complaints

log = logging.getLogger(__name__)


def _told(task: Task) -> str:
    return f"{task.device_id} ({arm_of(task.work)}; {task.reason})" if task.reason else task.device_id


class Executor:
    """The hands of one job."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        versions: Versions,
        *,
        meter: Meter,
        outbound: Outbound,
        streams: Streams,
        complaints: Complaints,
    ) -> None:
        """Prepare; all parts are of the same job."""
        self._streams = streams
        self._settings, self._store, self._versions = settings, store, versions
        self._meter, self._outbound, self._complaints = meter, outbound, complaints
        self._marks: list[Mark] = []

    def carry_out(self, actions: Iterable[Action], now: float) -> list[Mark]:
        """Carry out actions in order, and return what was noted of devices; StateError if the store cannot be read or written."""
        self._marks = []
        for is_turn, some in groupby(actions, lambda action: isinstance(action, Close | Enrol)):
            if is_turn:
                self._turn([*some], now)
            else:
                for action in some:
                    self._carry_out(action, now)
        return self._marks

    def _turn(self, actions: Sequence[Action], now: float) -> None:
        """Close a round, or open one; both wait for the disk once."""
        with self._store.together():
            for action in actions:
                match action:
                    case Close():
                        self._close(action, now)
                    case Enrol():
                        self._enrol(action.tasks, now)
        if any(isinstance(action, Close) for action in actions):
            self._outbound.announce()

    def _carry_out(self, action: Action, now: float) -> None:
        match action:
            case Assign():
                self._offer(action.task, action.deadline_s, now)
            case Dismiss():
                self._dismiss(action, now)
            case Finish():
                self._finish(action, now)
            case Record():
                self._store.note(action.round, action.note)
            case Tell():
                self._outbound.tell(action.device_id, action.message)
            case Repeat():
                self._store.repeat(action.round, action.first)

    def _enrol(self, tasks: tuple[Task, ...], now: float) -> None:
        number = tasks[0].round
        log.info("round %d: asking %s", number, listed([_told(task) for task in tasks]))
        self._store.enrol(tasks)
        self._meter.turn_to(number, now)

    def _offer(self, task: Task, deadline_s: float, now: float) -> None:
        download = self._versions.downlink.offer(
            task.device_id,
            task.version,
            chunk_bytes=self._outbound.chunk_bytes,
            exactly=task.role == "evaluate" or 0 < task.version <= self._settings.head_rounds,
            packing=task.plan.down if task.plan else None,
            mask=self._versions.mask_of(task),
        )
        memory = self._versions.remembered(task)
        offer = Offer(
            job=self._settings.job,
            task_id=task.task_id,
            round=task.round,
            version=task.version,
            role=task.role,
            work=task.work,
            deadline_s=deadline_s,
            memory=memory,
            lazy=self._versions.lazy_bound if memory else 0.0,
            grid=self._versions.grid_of(task),
            mask_group=self._outbound.mask_group if task.work.codec == MASKED else "",
            shared=self._streams.name_for(task.device_id, download.adapter, now),
            **download._asdict(),
        )
        self._outbound.tell(task.device_id, offer)

    def _close(self, close: Close, now: float) -> None:
        unmasking = close.unmasking
        self._meter.turn_to(close.round + 1 if close.round < self._settings.rounds else AFTERWARDS, now)
        self._marks += self._versions.close(close.round, close.version, lost=close.lost, unmasking=unmasking)
        log.info("round %d: closed with %s", close.round, listed(close.devices))

    def _dismiss(self, dismiss: Dismiss, now: float) -> None:
        who = dismiss.device_id
        self._complaints.warn(who, now, "device %s dismissed: %s", who, dismiss.reason)
        finished = Finished(job=self._settings.job, reason=dismiss.reason, is_error=dismiss.is_error)
        self._outbound.tell(dismiss.device_id, finished)

    def _finish(self, finish: Finish, now: float) -> None:
        self._meter.spend(now)
        self._store.finish()
        for device_id in finish.devices:
            self._outbound.tell(device_id, Finished(job=self._settings.job, reason=finish.reason))
        self._outbound.announce()
        log.info("finished: %s", finish.reason)
