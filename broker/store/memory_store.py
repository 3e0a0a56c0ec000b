"""A job's memory for simulations: nothing is written, and all of it is gone with the process."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from hashlib import sha256
from typing import NamedTuple

from fleetune.broker.store.memories import Memories
from fleetune.broker.store.replicas import Replicas
from fleetune.broker.store.store import (
    NOBODY,
    Accepted,
    Arrival,
    Carried,
    Cost,
    Decided,
    Figures,
    Line,
    Past,
    accepted_outcome,
    finite,
)
from fleetune.broker.tasks import HELD, NOTHING, Declined, Mark, Note, Noted, Outcome, Task, arm_of
from fleetune.device_runtime.contracts.wire import Report, UpdateReady
from fleetune.device_runtime.errors import StateError, WireError


class _Version(NamedTuple):
    content: bytes
    digest: str
    state: bytes
    round: int
    updates: tuple[UpdateReady, ...]


class MemoryStore:
    """A :class:`fleetune.broker.store.store.Store` in dictionaries; payloads are forgotten once they are in a version."""

    def __init__(self) -> None:
        self.finished = False
        self.replicas = Replicas()
        self.memories = Memories()
        self._last: dict[str, str] = {}
        self._versions: list[_Version] = []
        self._by_digest: dict[str, int] = {}
        self._kept: set[int] = set()
        self._tasks: dict[str, Task] = {}
        self._open: list[Task] = []
        self._known_before: dict[str, int] = {}
        self._updates: dict[str, UpdateReady] = {}
        self._noted: dict[str, Noted] = {}
        self._declines: dict[str, tuple[str, str]] = {}
        self._outcomes: list[tuple[str, bool]] = []
        """(task, whether it was declined)."""
        self._payloads: dict[str, bytes] = {}
        self._notes: list[Note] = []
        self._first = 0
        self._reports: dict[int, dict[str, Report]] = {}
        self._costs: dict[int, Cost] = {}
        self._carried: dict[int, dict[str, Carried]] = {}
        self._marks: dict[tuple[int, str, str], Mark] = {}

    @property
    def newest(self) -> int:
        """The newest version; -1 before the first."""
        return len(self._versions) - 1

    @property
    def settled(self) -> int:
        """None is."""
        return 0

    def past(self) -> Past:
        """Where the job stands."""
        return Past(
            version=max(self.newest, 0),
            closed=self._versions[-1].round if self._versions else 0,
            tasks=tuple(self._open),
            accepted={task_id: update.payload.sha256 for task_id, update in self._updates.items()},
            reported=frozenset((v, device) for v, reports in self._reports.items() for device in reports),
            finished=self.finished,
            declined={
                task.task_id: Declined(*self._declines[task.task_id])
                for task in self._open
                if task.task_id in self._declines
            },
            marks=tuple(self._marks.values()),
            first=self._first,
            notes=tuple(self._notes),
        )

    def digest_of(self, task_id: str) -> str | None:
        """Digest of the accepted update of a task; None if it has none."""
        update = self._updates.get(task_id)
        return update.payload.sha256 if update else None

    def last_update(self, device_id: str) -> str | None:
        """Digest of the last accepted update of a device; None if it has none."""
        return self._last.get(device_id)

    def turns(self, round_number: int | None = None) -> dict[str, int]:
        """In how many rounds, up to one, each device was asked to train and did not decline, whatever came of it."""
        asked = {
            (task.device_id, task.round)
            for task in self._tasks.values()
            if task.task_id not in self._declines and (round_number is None or task.round <= round_number)
        }
        return dict(Counter(device for device, _ in asked))

    def outcomes(self) -> Iterator[Outcome]:
        """Every accepted update and declined task of the job, in the order in which they came."""
        for task_id, is_declined in self._outcomes:
            task = self._tasks[task_id]
            if is_declined:
                yield Outcome(task.device_id, task.work, {}, self._declines[task_id][0], task.round)
            else:
                update, noted = self._updates[task_id], self._noted[task_id]
                yield accepted_outcome(task, update, noted)

    def decided(self) -> Iterator[Decided]:
        """Every training task of the job in the order in which they were chosen, and what came of it."""
        for task_id, task in self._tasks.items():
            update, declined = self._updates.get(task_id), self._declines.get(task_id)
            stats = finite(update.stats) if update else None
            yield Decided(task, self._known_before[task_id], stats, declined and declined[1])

    def enrol(self, tasks: Iterable[Task]) -> None:
        """Keep tasks."""
        for task in tasks:
            self._tasks[task.task_id] = task
            self._known_before[task.task_id] = len(self._outcomes)
            self._open.append(task)

    def accept(self, update: UpdateReady, payload: bytes, noted: Noted = NOTHING) -> None:
        """Keep the update of a task; WireError if the task was not enrolled, or has one."""
        if update.task_id not in self._tasks:
            raise WireError(f"task {update.task_id!r} was not enrolled")
        if update.task_id in self._updates:
            raise WireError(f"task {update.task_id!r} has an update already")
        self._updates[update.task_id], self._noted[update.task_id] = update, noted
        self._outcomes.append((update.task_id, False))
        self._payloads[update.task_id] = payload
        self._last[self._tasks[update.task_id].device_id] = update.payload.sha256

    def accept_all(self, arrived: Iterable[Arrival]) -> None:
        """Keep several."""
        for one in arrived:
            self.accept(*one)

    def together(self) -> AbstractContextManager[None]:
        """Do nothing: memory is never durable."""
        return nullcontext()

    def decline(self, task_id: str, cause: str, reason: str) -> None:
        """Keep that a device declined a task, and why."""
        if task_id not in self._declines:
            self._declines[task_id] = cause, reason
            self._outcomes.append((task_id, True))

    def note(self, round_number: int, note: Note) -> None:
        """Keep something that the masks of the open round go by."""
        self._notes.append(note)

    def repeat(self, round_number: int, first: int) -> None:
        """Forget the notes of the open round; its tasks before position ``first`` and their updates count no more."""
        self._first = first
        self._notes.clear()
        self._payloads.clear()

    def accepted(self) -> Iterator[Accepted]:
        """Updates that are in no version yet."""
        for task_id, payload in self._payloads.items():
            yield Accepted(self._tasks[task_id], self._updates[task_id].num_samples, payload)

    def add_version(
        self,
        version: int,
        content: bytes,
        *,
        round_number: int,
        state: bytes = b"",
        marks: Iterable[Mark] = (),
    ) -> None:
        """Keep an adapter and the strategy's state after it; the accepted updates are in it."""
        updates = tuple(self._updates[task_id] for task_id in self._payloads)
        self._versions[-1:] = [last._replace(state=b"") for last in self._versions[-1:]]
        made = _Version(content, sha256(content).hexdigest(), state, round_number, updates)
        self._versions.append(made)
        self._by_digest[made.digest] = self.newest
        self._kept.add(self.newest)
        self._payloads.clear()
        self._notes.clear()
        self._first = 0
        self._open.clear()
        for mark in marks:
            self.mark(mark)

    def mark(self, mark: Mark) -> bool:
        """Keep what is noted of a device; False if that of this kind was noted in this round already."""
        return self._marks.setdefault((mark.round, mark.device, mark.kind), mark) is mark

    def marks(self) -> list[Mark]:
        """All that was noted of devices, in its order."""
        return list(self._marks.values())

    def version(self, version: int) -> bytes:
        """Content of the adapter file of a version; StateError if there is none."""
        found = self._version(version)
        if version not in self._kept:
            raise StateError(f"version {version} is not kept any more")
        return found.content

    def forget_before(self, version: int, *, but: Collection[str] = ()) -> None:
        """Let go of the adapters of the versions before this one, but for version 0 and some by their SHA-256."""
        for old in [v for v in self._kept if 0 < v < min(version, self.newest)]:
            made = self._versions[old]
            if made.digest not in but:
                self._versions[old] = made._replace(content=b"")
                self._kept.discard(old)

    def settle(self, version: int, *, most: int) -> None:
        """Do nothing: all of it goes with the process."""

    def line(self, version: int) -> Line | None:
        """None: nothing is settled."""
        return None

    def version_with(self, digest: str) -> int | None:
        """The newest version whose adapter file has this SHA-256; None if there is none, or it is not kept any more."""
        found = self._by_digest.get(digest, -1)
        return found if found in self._kept else None

    def strategy_state(self, version: int) -> bytes:
        """The strategy's state after the newest version; empty if it has none, and of all before."""
        return self._version(version).state

    def report(self, report: Report) -> bool:
        """Keep an evaluation; False if there was one already."""
        reports = self._reports.setdefault(report.version, {})
        return reports.setdefault(report.device_id, report) is report

    def figures(self, version: int) -> Figures:
        """What was told about a version."""
        made, reports = self._version(version), self._reports.get(version, {}).values()
        return Figures(
            made.round,
            [(finite(u.stats).get("loss"), u.num_samples) for u in made.updates],
            [(r.loss, r.accuracy, r.num_samples, r.device_id) for r in reports],
            Counter(arm_of(self._tasks[u.task_id].work) for u in made.updates),
            sum(self._noted[u.task_id].skipped for u in made.updates),
            len({d for r, d, kind in self._marks if r == made.round and kind in HELD}),
        )

    def spend(self, round_number: int, cost: Cost, carried: Mapping[str, Carried] = NOBODY) -> None:
        """Add to what a round, or AFTERWARDS, has cost, and to what was carried in it, by device."""
        self._costs[round_number] = self._costs.get(round_number, Cost()) + cost
        _add(self._carried.setdefault(round_number, {}), carried)

    def cost(self, round_number: int | None = None) -> Cost:
        """What a round has cost, or the whole job."""
        if round_number is not None:
            return self._costs.get(round_number, Cost())
        return sum(self._costs.values(), start=Cost())

    def carried(self, round_number: int | None = None) -> dict[str, Carried]:
        """What was carried in a round, or in all of them together, by device; empty for the aggregator's own words."""
        found: dict[str, Carried] = {}
        numbers = self._carried if round_number is None else {round_number}
        for number in numbers:
            _add(found, self._carried.get(number, NOBODY))
        return dict(sorted(found.items()))

    def finish(self) -> None:
        """Keep that the job is over."""
        self.finished = True

    def _version(self, version: int) -> _Version:
        if not 0 <= version <= self.newest:
            raise StateError(f"version {version} was never made; the newest is {self.newest}")
        return self._versions[version]


def _add(sums: dict[str, Carried], carried: Mapping[str, Carried]) -> None:
    for device, one in carried.items():
        sums[device] = sums.get(device, Carried()) + one
