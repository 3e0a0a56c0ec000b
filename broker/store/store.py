"""What an aggregator needs of whatever remembers its job: on disk (``ledger``), or in memory (``memory_store``)."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import reduce
from operator import add
from typing import NamedTuple, Protocol

import msgspec

from fleetune.broker.store.memories import Memories
from fleetune.broker.store.replicas import Replicas
from fleetune.broker.tasks import NOTHING, Declined, Mark, Note, Noted, Outcome, Task
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.wire import Report, UpdateReady

AFTERWARDS = -1
"""Stands for a round where the time after the last one is meant."""
BEFORE = -2
"""Stands for all rounds that are settled: what they cost is known of all of them together."""


class Past(NamedTuple):
    """What a federation remembers across restarts."""

    version: int = 0
    """The newest."""
    closed: int = 0
    """Rounds closed."""
    tasks: tuple[Task, ...] = ()
    """Of the open round, by position; empty if none is open."""
    accepted: Mapping[str, str] = {}
    """Digest of the accepted update by task."""
    reported: frozenset[tuple[int, str]] = frozenset()
    """Evaluations at hand: (version, device)."""
    finished: bool = False
    declined: Mapping[str, Declined] = {}
    """What devices said that declined their tasks of the open round, by task."""
    marks: tuple[Mark, ...] = ()
    """All of the job, in their order."""
    first: int = 0
    """Position of the first task of the open round that counts."""
    notes: tuple[Note, ...] = ()
    """Of the masks of the open round, in their order."""


class Accepted(NamedTuple):
    """An accepted update that is in no version yet."""

    task: Task
    num_samples: int
    payload: bytes


class Arrival(NamedTuple):
    """An update that is good, to be kept."""

    update: UpdateReady
    payload: bytes
    noted: Noted = NOTHING


class Decided(NamedTuple):
    """A task, what was known when it was chosen, and what came of it."""

    task: Task
    num_outcomes: int
    """Of the job, so far, when it was chosen; -1 in a ledger that does not say."""
    stats: Mapping[str, float] | None
    """Of its update; None without one."""
    declined: str | None
    """Why its device declined it, in words; None if it did not."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What something has cost."""

    bytes_down: int = 0
    """Payload of the chunks sent to devices, repetitions included."""
    bytes_up: int = 0
    """Payload of the chunks received from devices, repetitions included."""
    bytes_sent: int = 0
    """What the aggregator's link sent: all messages, with their topics."""
    bytes_received: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            bytes_down=self.bytes_down + other.bytes_down,
            bytes_up=self.bytes_up + other.bytes_up,
            bytes_sent=self.bytes_sent + other.bytes_sent,
            bytes_received=self.bytes_received + other.bytes_received,
            seconds=self.seconds + other.seconds,
        )


class ByKind(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes by what they are."""

    values: int = 0
    """Of tensors, whole or quantised."""
    positions: int = 0
    """Which elements they are of: bitmaps and indices."""
    scales: int = 0
    """What quantised values are counted in."""
    protocol: int = 0
    """All else: names, shapes, frames, headers, offers, requests, verdicts."""

    def __add__(self, other: "ByKind") -> "ByKind":
        return ByKind(
            values=self.values + other.values,
            positions=self.positions + other.positions,
            scales=self.scales + other.scales,
            protocol=self.protocol + other.protocol,
        )

    @property
    def total(self) -> int:
        """All together."""
        return self.values + self.positions + self.scales + self.protocol


class Carried(msgspec.Struct, frozen=True, kw_only=True):
    """Payload of the MQTT messages between the aggregator and one device, repetitions included."""

    down: ByKind = ByKind()
    up: ByKind = ByKind()

    def __add__(self, other: "Carried") -> "Carried":
        return Carried(down=self.down + other.down, up=self.up + other.up)


NOBODY: Mapping[str, Carried] = {}


def in_all(carried: Mapping[str, Carried]) -> Carried:
    """What was carried of all devices together."""
    return reduce(add, carried.values(), Carried())


def accepted_outcome(task: Task, update: UpdateReady, noted: Noted) -> Outcome:
    """What is learned from an accepted update."""
    return Outcome(
        task.device_id,
        task.work,
        finite(update.stats),
        round=task.round,
        num_samples=update.num_samples,
        noted=noted,
    )


def finite(stats: Mapping[str, float]) -> dict[str, float]:
    """Statistics that a store keeps: a device may send any number."""
    return {name: value for name, value in stats.items() if abs(value) <= FIGURE_MAX}


class Figures(NamedTuple):
    """What was told about one version."""

    round: int
    """That made it; 0 for version 0."""
    trained: Sequence[tuple[float | None, int]]
    """(last local loss, samples) of each update that went into it."""
    evaluated: Sequence[tuple[float, float, int, str]]
    """(loss, accuracy, samples, device) of each report on it."""
    arms: Mapping[str, int] = {}
    """How many of the updates came of which policy."""
    skipped: int = 0
    """How many said that the last one of their device counts again."""
    held: int = 0
    """How many were beyond a bound of their round, and counted for less."""


class Line(NamedTuple):
    """What stays of a version that is settled."""

    turns: int
    """Of the device that was asked most often, up to it."""
    text: str
    """Its row as JSON, without epsilon."""


class Store(Protocol):
    """The memory of one job. What a method has kept is durable when it returns; StateError if it cannot be kept or read."""

    @property
    def finished(self) -> bool:
        """Whether ``finish`` was called."""

    @property
    def newest(self) -> int:
        """The newest version; -1 before the first."""

    @property
    def settled(self) -> int:
        """The newest version that is settled, with all before it but 0: a line is known of it, or nothing; 0 for none."""

    @property
    def replicas(self) -> Replicas:
        """Adapters that devices have in place of versions."""

    @property
    def memories(self) -> Memories:
        """What codecs remember of devices' updates."""

    def last_update(self, device_id: str) -> str | None:
        """Digest of the last accepted update of a device; None if it has none."""

    def past(self) -> Past:
        """Where the job stands."""

    def digest_of(self, task_id: str) -> str | None:
        """Digest of the accepted update of a task; None if it has none."""

    def turns(self, round_number: int | None = None) -> dict[str, int]:
        """In how many rounds, up to 0 or one that is not settled, each device was asked to train and did not decline."""

    def outcomes(self) -> Iterator[Outcome]:
        """Every accepted update and declined task of the rounds that are not settled, in the order in which they came."""

    def decided(self) -> Iterator[Decided]:
        """Every training task of the rounds that are not settled in the order of their choice, and what came of it."""

    def enrol(self, tasks: Iterable[Task]) -> None:
        """Keep tasks, before they are offered."""

    def accept(self, update: UpdateReady, payload: bytes, noted: Noted = NOTHING) -> None:
        """Keep the update of a task, with what is noted of it; WireError if the task was not enrolled, or has one."""

    def accept_all(self, arrived: Sequence[Arrival]) -> None:
        """As ``accept``, for several in less time; none is kept if one cannot be."""

    def together(self) -> AbstractContextManager[object]:
        """Have what is kept within the block become durable at its end, all of it or nothing; within another, at that one's."""

    def decline(self, task_id: str, cause: str, reason: str) -> None:
        """Keep that a device declined a task, and why: ``cause`` is one of the wire's CAUSES. A second time is nothing new."""

    def note(self, round_number: int, note: Note) -> None:
        """Keep something that the masks of the open round go by, until it is closed or begun anew."""

    def repeat(self, round_number: int, first: int) -> None:
        """Forget the notes of the open round; its tasks before position ``first`` and their updates count no more."""

    def accepted(self) -> Iterator[Accepted]:
        """Updates that are in no version yet, one payload in memory at a time."""

    def add_version(
        self,
        version: int,
        content: bytes,
        *,
        round_number: int,
        state: bytes = b"",
        marks: Iterable[Mark] = (),
    ) -> None:
        """Keep an adapter and the strategy's state after it: the accepted updates are in it, and the round is closed.

        What was noted of their devices then is kept with it.
        """

    def mark(self, mark: Mark) -> bool:
        """Keep what is noted of a device; False if that of this kind was noted in this round already."""

    def marks(self) -> list[Mark]:
        """All that was noted of devices and is kept, in its order."""

    def version(self, version: int) -> bytes:
        """Content of the adapter file of a version."""

    def forget_before(self, version: int, *, but: Collection[str] = ()) -> None:
        """Let go of the adapters of the versions before this one, but for version 0 and some by their SHA-256.

        What else is known of them stays.
        """

    def settle(self, version: int, *, most: int) -> None:
        """Settle versions before this one, which nobody is at any more; of at most ``most``, evenly spaced, a line stays.

        What later rounds go by stays: turns, last updates, sums of costs, marks of MARK_ROUNDS, and of a job that chooses by
        what was told, everything.
        """

    def line(self, version: int) -> Line | None:
        """What stays of a settled version; None if nothing does, or it is not settled."""

    def version_with(self, digest: str) -> int | None:
        """The newest version whose adapter file has this SHA-256; None if there is none, or it is not kept any more."""

    def strategy_state(self, version: int) -> bytes:
        """The strategy's state after the newest version; empty if it has none, and of all before."""

    def report(self, report: Report) -> bool:
        """Keep an evaluation; False if there was one already, or its version is settled."""

    def figures(self, version: int) -> Figures:
        """What was told about a version."""

    def spend(self, round_number: int, cost: Cost, carried: Mapping[str, Carried] = NOBODY) -> None:
        """Add to what a round, or AFTERWARDS, has cost, and to what was carried in it, by device."""

    def cost(self, round_number: int | None = None) -> Cost:
        """What a round has cost, or the whole job."""

    def carried(self, round_number: int | None = None) -> dict[str, Carried]:
        """What was carried in a round, or in all of them together, by device; empty for the aggregator's own words."""

    def finish(self) -> None:
        """Keep that the job is over."""
