"""The aggregator's memory on disk: SQLite and files, so that what was acknowledged survives a SIGKILL.

A file is written whole and synced before the row that names it, so a row never names what is not there. Others may read the
database while an aggregator works: ``sqlite3.connect("file:OUT/ledger.sqlite?mode=ro", uri=True)``.
"""

import sqlite3
import time
import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fleetune.broker.jobs.settings import FIXED, Settings
from fleetune.broker.store import asked, settling
from fleetune.broker.store.asked import TASKS, WITH_TASKS, noted_of, stats_of
from fleetune.broker.store.blobs import Blobs, places_of
from fleetune.broker.store.costs import add_carried, add_cost, total_carried, total_cost
from fleetune.broker.store.damage import DAMAGES, damaged
from fleetune.broker.store.ledger_schema import TASK, add_decline, add_tasks, parse_work, task_of
from fleetune.broker.store.marks import add_marks, count_held, read_marks
from fleetune.broker.store.mask_notes import add_note, begin_anew, first_and_notes, forget_notes
from fleetune.broker.store.memories import Memories
from fleetune.broker.store.opening import opened, taken
from fleetune.broker.store.replicas import Replicas
from fleetune.broker.store.rows import row
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
    finite,
)
from fleetune.broker.tasks import NOTHING, Declined, Mark, Note, Noted, Outcome, Task, arm_of
from fleetune.device_runtime.contracts.fields import Count, Word
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.contracts.wire import Report, UpdateReady
from fleetune.device_runtime.errors import StateError, WireError
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.prepared import prepared


class Ledger:
    """The :class:`fleetune.broker.store.store.Store` of one job in one folder; one aggregator at a time."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Open or begin; a ledger of an earlier format is brought to this one.

        Raises:
            ConfigError: the folder is another job's, or another aggregator's at this moment.
            StateError: the ledger is damaged, or of another format; or the folder cannot be written.
        """
        self.folder = folder
        self._chooses = (settings.configurator, settings.traffic) != (FIXED, FIXED)
        with doing("written", folder):
            self._blobs = Blobs(folder)
        self._is_open, self._to_sweep = False, -1
        """Whether a block of ``together`` is open; and the version whose payloads are to go after the commit, -1 for none."""
        self.replicas = Replicas(folder / "replicas")
        """Adapters that devices have in place of versions."""
        self.memories = Memories(folder / "memories")
        """What codecs remember of devices' updates."""
        self._give_back = weakref.finalize(self, taken(folder).close)
        try:
            self._sql, self.begun = opened(folder / LEDGER, settings)
        except BaseException:
            self._give_back()
            raise
        with self._reading():
            self.finished = self._one("SELECT finished IS NOT NULL FROM job") == 1
        """Whether the job is over."""

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        self._sql.close()
        self._give_back()

    @property
    def newest(self) -> int:
        """The newest version; -1 before the first."""
        with self._reading():
            newest: int = self._one("SELECT coalesce(max(version), -1) FROM versions")
        return newest

    @property
    def settled(self) -> int:
        """The newest version that is settled, with all before it but 0; 0 for none."""
        with self._reading():
            return settling.settled_to(self._sql)

    def past(self) -> Past:
        """Where the job stands."""
        with self._reading():
            closed = self._one("SELECT coalesce(max(round), 0) FROM versions")
            tasks = self._sql.execute(
                f"SELECT {TASK} FROM {TASKS} WHERE round > ? ORDER BY round, position", (closed,)
            )
            updates = self._sql.execute("SELECT task_id, digest FROM updates")
            declines = self._sql.execute(
                "SELECT task_id, cause, declines.reason FROM declines JOIN tasks USING (task_id) WHERE round > ?",
                (closed,),
            )
            reports = self._sql.execute("SELECT version, device FROM evaluations")
            first, notes = first_and_notes(self._sql, closed)
            return Past(
                version=max(self.newest, 0),
                closed=closed,
                tasks=tuple(task_of(row) for row in tasks),
                accepted=dict(updates.fetchall()),
                reported=frozenset(reports.fetchall()),
                finished=self.finished,
                declined={task_id: msgspec.convert(said, prepared(Declined)) for task_id, *said in declines},
                marks=tuple(read_marks(self._sql)),
                first=first,
                notes=notes,
            )

    def digest_of(self, task_id: str) -> str | None:
        """Digest of the accepted update of a task; None if it has none."""
        with self._reading():
            found: str | None = self._one("SELECT digest FROM updates WHERE task_id = ?", task_id)
        return found

    def last_update(self, device_id: str) -> str | None:
        """Digest of the last accepted update of a device; None if it has none."""
        with self._reading():
            return asked.last_update(self._sql, device_id)

    def turns(self, round_number: int | None = None) -> dict[str, int]:
        """In how many rounds, up to 0 or one that is not settled, each device was asked to train and did not decline."""
        with self._reading():
            return asked.turns(self._sql, round_number)

    def outcomes(self) -> Iterator[Outcome]:
        """Every accepted update and declined task of the rounds that are not settled, in the order in which they came."""
        with self._reading():
            yield from asked.outcomes(self._sql)

    def decided(self) -> Iterator[Decided]:
        """Every training task of the rounds that are not settled in the order of their choice, and what came of it."""
        with self._reading():
            yield from asked.decided(self._sql)

    def begin(self) -> int:
        """Keep that the job is started once more; return how often it was, from 1, higher at every call."""
        with self._durably():
            number = self._sql.execute("INSERT INTO starts VALUES (NULL, ?)", (time.time(),)).lastrowid
            self._sql.execute("DELETE FROM starts WHERE number < ?", (number,))
        return int(number or 0)

    def enrol(self, tasks: Iterable[Task]) -> None:
        """Keep tasks; once this returns they may be offered."""
        with self._durably():
            add_tasks(self._sql, tasks)

    def accept(self, update: UpdateReady, payload: bytes, noted: Noted = NOTHING) -> None:
        """Keep the update of a task; once this returns it may be acknowledged.

        Raises:
            WireError: the task was not enrolled, or has an update.
        """
        self.accept_all([Arrival(update, payload, noted)])

    def accept_all(self, arrived: Sequence[Arrival]) -> None:
        """As :meth:`accept`, for several with one commit; none is kept if one cannot be."""
        with self._durably():
            payloads = {one.update.task_id: one.payload for one in arrived}
            places = places_of(payloads)
            for update, _, noted in arrived:
                self._add_update(update, noted, places[update.task_id])
            self._blobs.write_payloads(payloads)

    def _add_update(self, update: UpdateReady, noted: Noted, place: str) -> None:
        task_id = update.task_id
        is_enrolled, is_there = self._sql.execute(_IS_THERE, (task_id, task_id)).fetchone()
        if not is_enrolled:
            raise WireError(f"task {task_id!r} was not enrolled")
        if is_there:
            raise WireError(f"task {task_id!r} has an update already")
        stats = msgspec.json.encode(finite(update.stats)).decode()
        more = msgspec.json.encode(noted).decode()
        row = (task_id, update.payload.sha256, update.num_samples, stats, place, more)
        self._sql.execute("INSERT INTO updates VALUES (NULL, ?, ?, ?, ?, ?, NULL, ?)", row)

    def decline(self, task_id: str, cause: str, reason: str) -> None:
        """Keep that a device declined a task, and why; once this returns another may be asked in its place."""
        with self._durably():
            add_decline(self._sql, task_id, cause, reason)

    def note(self, round_number: int, note: Note) -> None:
        """Keep something that the masks of the open round go by; once this returns others may be told."""
        with self._durably():
            add_note(self._sql, round_number, note)

    def repeat(self, round_number: int, first: int) -> None:
        """Forget the notes of the open round; its tasks before position ``first`` and their updates count no more."""
        with self._durably():
            begin_anew(self._sql, round_number, first)

    def accepted(self) -> Iterator[Accepted]:
        """Updates that are in no version yet, one payload in memory at a time."""
        query = f"""SELECT digest, num_samples, file, {TASK} FROM {WITH_TASKS}
                    WHERE made IS NULL ORDER BY updates.number"""
        with self._reading():
            found = [
                (task_of(task), *msgspec.convert((num_samples, name, digest), prepared(_Payload)))
                for digest, num_samples, name, *task in self._sql.execute(query)
            ]
        for task, num_samples, name, digest in found:
            yield Accepted(task, num_samples, self._blobs.payload(name, digest))

    def add_version(
        self,
        version: int,
        content: bytes,
        *,
        round_number: int,
        state: bytes = b"",
        marks: Iterable[Mark] = (),
    ) -> None:
        """Keep an adapter and the strategy's state after it; the accepted updates are in it, and the round is closed."""
        digests = (sha256(content).hexdigest(), sha256(state).hexdigest() if state else "")
        with self._durably():
            self._blobs.write_version(version, content, state)
            self._sql.execute("INSERT INTO versions VALUES (?, ?, ?, ?)", (version, round_number, *digests))
            self._sql.execute("UPDATE versions SET state = '' WHERE version = ?", (version - 1,))
            self._sql.execute("UPDATE updates SET made = ? WHERE made IS NULL", (version,))
            add_marks(self._sql, marks)
            forget_notes(self._sql, round_number)
            self._to_sweep = version

    def mark(self, mark: Mark) -> bool:
        """Keep what is noted of a device; False if that of this kind was noted in this round already."""
        with self._durably():
            return add_marks(self._sql, [mark]) == 1

    def marks(self) -> list[Mark]:
        """All that was noted of devices and is kept, in its order."""
        with self._reading():
            return read_marks(self._sql)

    def version(self, version: int) -> bytes:
        """Content of the adapter file of a version; StateError if it is not what was written."""
        with self._reading():
            digest = self._one("SELECT sha256 FROM versions WHERE version = ?", version)
        return self._blobs.version(version, digest)

    def forget_before(self, version: int, *, but: Collection[str] = ()) -> None:
        """Delete the files of the versions before this one, but for version 0 and some by their SHA-256; their rows stay."""
        with self._durably():
            for old in self._blobs.kept_before(min(version, self.newest)):
                if self._one("SELECT sha256 FROM versions WHERE version = ?", old) not in but:
                    self._blobs.forget(old)

    def settle(self, version: int, *, most: int) -> None:
        """Settle versions before this one, some at once, but in a job that chooses by what was told: that needs all of it."""
        due = range(self.settled + 1, version)[: settling.MOST_AT_ONCE]
        if self._chooses or len(due) < settling.AT_ONCE:
            return
        lines = [(one, msgspec.json.encode(row(self, one)).decode()) for one in due]
        with self._durably():
            settling.settle(self._sql, lines, most=most)
            settling.forget_versions(self._sql, but={*self._blobs.kept_before(version)})
        with self._durably():
            settling.give_back(self._sql)

    def line(self, version: int) -> Line | None:
        """What stays of a settled version; None if nothing does, or it is not settled."""
        with self._reading():
            return settling.line(self._sql, version)

    def version_with(self, digest: str) -> int | None:
        """The newest version whose adapter file has this SHA-256; None if there is none, or it is not kept any more."""
        with self._reading():
            found: int | None = self._one("SELECT max(version) FROM versions WHERE sha256 = ?", digest)
        return found if found is not None and self._blobs.has_version(found) else None

    def strategy_state(self, version: int) -> bytes:
        """The strategy's state after the newest version; empty if it has none, and of all before."""
        with self._reading():
            digest = self._one("SELECT state FROM versions WHERE version = ?", version)
        return self._blobs.state(version, digest) if digest else b""

    def report(self, report: Report) -> bool:
        """Keep an evaluation; False if there was one already, or its version is settled."""
        if 0 < report.version <= self.settled:
            return False
        row = (
            report.version,
            report.device_id,
            report.task_id,
            report.loss,
            report.accuracy,
            report.num_samples,
        )
        with self._durably():
            added = self._sql.execute("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?, ?)", row)
        return added.rowcount == 1

    def figures(self, version: int) -> Figures:
        """What was told about a version."""
        with self._reading():
            trained = self._sql.execute(
                "SELECT stats, num_samples, noted FROM updates WHERE made = ? AND made > 0 ORDER BY number",
                (version,),
            ).fetchall()
            evaluated = self._sql.execute(
                "SELECT loss, accuracy, num_samples, device FROM evaluations WHERE version = ? ORDER BY rowid",
                (version,),
            )
            number = self._one("SELECT round FROM versions WHERE version = ?", version)
            policies = self._sql.execute(
                f"""SELECT works.work, count(*) FROM {WITH_TASKS} WHERE made = ? AND made > 0 GROUP BY works.work
                    ORDER BY min(updates.number)""",
                (version,),
            )
            arms: Counter[str] = Counter()
            for work, count in policies:
                arms[arm_of(parse_work(work, 0))] += count
            losses = [(stats_of(stats).get("loss"), num_samples) for stats, num_samples, _ in trained]
            skipped = sum(noted_of(noted).skipped for *_, noted in trained)
            held = count_held(self._sql, number) if version else 0
            return msgspec.convert(
                (number, losses, evaluated.fetchall(), arms, skipped, held), prepared(Figures)
            )

    def spend(self, round_number: int, cost: Cost, carried: Mapping[str, Carried] = NOBODY) -> None:
        """Add to what a round, or AFTERWARDS, has cost, and to what was carried in it, by device."""
        with self._durably():
            add_cost(self._sql, round_number, cost)
            add_carried(self._sql, round_number, carried)

    def cost(self, round_number: int | None = None) -> Cost:
        """What a round has cost, or the whole job."""
        with self._reading():
            return total_cost(self._sql, round_number)

    def carried(self, round_number: int | None = None) -> dict[str, Carried]:
        """What was carried in a round, or in all of them together, by device; empty for the aggregator's own words."""
        with self._reading():
            return total_carried(self._sql, round_number)

    def finish(self) -> None:
        """Keep that the job is over."""
        with self._durably():
            self._sql.execute("UPDATE job SET finished = coalesce(finished, ?)", (time.time(),))
        self.finished = True

    @contextmanager
    def together(self) -> Iterator[None]:
        """Commit once what is kept within the block, at its end; within another block, at the end of that."""
        with self._durably():
            is_inner, self._is_open = self._is_open, True
            try:
                yield
            finally:
                self._is_open = is_inner

    @contextmanager
    def _durably(self) -> Iterator[None]:
        if self._is_open:
            yield
            return
        try:
            with self._sql:
                yield
                self._blobs.sync()
            newest, self._to_sweep = self._to_sweep, -1
            if newest >= 0:  # payloads go once it is on disk that a version has them
                self._blobs.sweep(newest=newest)
        except (sqlite3.Error, OSError) as exc:
            raise StateError(f"{self.folder}: cannot write the ledger: {exc}") from exc

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except DAMAGES as exc:
            raise damaged(self.folder / LEDGER, exc) from exc

    def _one(self, query: str, *values: object) -> Any:
        found = self._sql.execute(query, values).fetchone()
        return found[0] if found else None


_IS_THERE = (
    "SELECT EXISTS (SELECT 1 FROM tasks WHERE task_id = ?), EXISTS (SELECT 1 FROM updates WHERE task_id = ?)"
)
_Payload = tuple[Count, str, Word]
