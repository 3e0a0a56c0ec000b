"""An outbox on disk, in SQLite: survives SIGKILL and loss of power at any moment."""

import logging
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import cast

from fleetune.device_runtime.agent.outbox import Entry, artifact_key, aside, renamed
from fleetune.device_runtime.errors import StateError, one_line
from fleetune.device_runtime.files import doing, private_file

log = logging.getLogger(__name__)

_NO_DAMAGE = ("disk is full", "readonly", "unable to open", "locked", "disk I/O error", "not authorized")
"""What SQLite says where a disk or another process is at fault, and nothing is damaged."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS deliveries (
    job TEXT NOT NULL, task_id TEXT NOT NULL, digest TEXT NOT NULL, header BLOB NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (job, task_id, digest)
);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""
_FROM_0_1 = """
BEGIN IMMEDIATE;
INSERT OR IGNORE INTO deliveries SELECT job, 'round-' || round, digest, header, payload FROM entries ORDER BY rowid;
DROP TABLE entries;
COMMIT;
"""


class Damaged(StateError):
    """What is in the file was not written by us."""


def open_outbox(path: Path) -> "OutboxFile":
    """Open or make the file; one that is damaged is set aside, so that the device goes on with what it has.

    Raises:
        StateError: the disk is full, say.
    """
    try:
        return OutboxFile(path)
    except Damaged as exc:
        log.warning(
            "%s; set aside as %s.aside: what it owed is done again, its name may be another", exc, path.name
        )
    with doing("set aside", path):
        path.replace(path.with_name(f"{path.name}.aside"))
        for left in (f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(left).unlink(missing_ok=True)
    return OutboxFile(path)


class OutboxFile:
    """A SQLite file. Every change is on disk when its method returns; one thread, one process at a time."""

    def __init__(self, path: Path | str) -> None:
        """Open or make the file.

        Raises:
            Damaged: it is damaged; every row is looked at.
            StateError: it cannot be opened.
        """
        self._path = Path(path)
        with doing("written", self._path):
            private_file(self._path)
        with self._told():
            self._database = sqlite3.connect(self._path, timeout=5.0, isolation_level=None)
        try:
            with self._told():
                self._prepare()
                self._check()
        except StateError:
            self._database.close()
            raise

    def claim(self, job: str, artifact: str) -> None:
        """Set aside what is of another artifact, and bring back what is of this one, in one transaction."""
        kept = (self.recall(artifact_key(job)) or artifact.encode()).decode(errors="replace")
        with self._told(), self._transaction():
            if kept != artifact:
                self._rename(job, aside(job, kept))
                self._rename(aside(job, artifact), job)
            self._remember({artifact_key(job): artifact.encode()})

    def put(self, entry: Entry, *, facts: Mapping[str, bytes] | None = None) -> None:
        """Add an entry, and remember ``facts`` in the same transaction; an entry that is there already stays."""
        with self._told(), self._transaction():
            self._database.execute("INSERT OR IGNORE INTO deliveries VALUES (?, ?, ?, ?, ?)", entry)
            self._remember(facts or {})

    def pending(self) -> list[Entry]:
        """Return the entries not acknowledged, in the order in which they were put."""
        with self._told():
            rows = self._database.execute(
                "SELECT job, task_id, digest, header, payload FROM deliveries ORDER BY rowid"
            )
            return [self._entry(row) for row in rows]

    def acknowledge(self, job: str, task_id: str, digest: str) -> bool:
        """Forget an entry; False if there is none."""
        where = "DELETE FROM deliveries WHERE job = ? AND task_id = ? AND digest = ?"
        with self._told():
            return self._database.execute(where, (job, task_id, digest)).rowcount > 0

    def remember(self, key: str, value: bytes) -> None:
        """Keep a small fact, such as the device's id or its current offer; replaces what was there."""
        with self._told(), self._transaction():
            self._remember({key: value})

    def recall(self, key: str) -> bytes | None:
        """Return the fact, or None."""
        with self._told():
            row = self._database.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        if row is not None and not isinstance(row[0], bytes):
            raise self._damaged(f"{one_line(key)} is no bytes")
        return None if row is None else row[0]

    def forget(self, key: str) -> None:
        """Drop a fact, if it is there."""
        with self._told():
            self._database.execute("DELETE FROM facts WHERE key = ?", (key,))

    def close(self) -> None:
        """Close the file; nothing is lost without it."""
        self._database.close()

    def __enter__(self) -> "OutboxFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)
        verdict = self._database.execute("PRAGMA quick_check(1)").fetchone()[0]
        if verdict != "ok":
            raise self._damaged(verdict)
        if self._database.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone():
            self._database.executescript(_FROM_0_1)

    def _check(self) -> None:
        """Look at every row once, but for what its bytes say."""
        typed = "job, task_id, digest, CAST(typeof(header) AS BLOB), CAST(typeof(payload) AS BLOB)"
        for row in self._database.execute(f"SELECT {typed} FROM deliveries"):
            if self._entry(row)[3:] != (b"blob", b"blob"):
                raise self._damaged("a delivery that is none")
        for key, kind in self._database.execute("SELECT key, typeof(value) FROM facts"):
            if not isinstance(key, str) or kind != "blob":
                raise self._damaged(f"{one_line(key)} is no bytes")

    def _entry(self, row: tuple[object, ...]) -> Entry:
        kinds = str, str, str, bytes, bytes
        if not all(isinstance(value, kind) for value, kind in zip(row, kinds, strict=True)):
            raise self._damaged("a delivery that is none")
        return Entry(*cast("tuple[str, str, str, bytes, bytes]", row))

    def _damaged(self, problem: object) -> Damaged:
        return Damaged(f"{self._path}: damaged: {one_line(problem)}; move it away to start afresh")

    def _rename(self, old: str, new: str) -> None:
        self._database.execute("UPDATE deliveries SET job = ? WHERE job = ?", (new, old))
        keys = [key for (key,) in self._database.execute("SELECT key FROM facts")]
        pairs = [(renamed(key, old, new), key) for key in keys if renamed(key, old, new) != key]
        self._database.executemany("UPDATE facts SET key = ? WHERE key = ?", pairs)

    def _remember(self, facts: Mapping[str, bytes]) -> None:
        self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", facts.items())

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        with self._database:
            yield

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, sqlite3.Warning, ValueError, TypeError, OverflowError) as exc:
            if any(part in str(exc) for part in _NO_DAMAGE):
                raise StateError(f"{self._path}: the device's state cannot be used: {one_line(exc)}") from exc
            raise self._damaged(exc) from exc
