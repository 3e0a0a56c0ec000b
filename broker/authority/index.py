"""What an authority has signed and revoked: one SQLite file, every change on disk when its transaction ends."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import private_file
from fleetune.device_runtime.prepared import prepared

_SCHEMA = """
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL, begins INTEGER NOT NULL,
    ends INTEGER NOT NULL, revoked INTEGER NOT NULL DEFAULT 0, pem TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS lists (number INTEGER PRIMARY KEY, at INTEGER NOT NULL);
"""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate; times in seconds since 1970, UTC."""

    serial: str
    """Hexadecimal."""
    kind: str
    """device, aggregator or server."""
    name: str
    key: str
    """SHA-256 of its public key, hexadecimal."""
    begins: int
    ends: int
    revoked: int = 0
    """When it was; 0: it was not."""
    pem: str


class Index:
    """Open within ``with``; one process at a time changes it, others wait."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; StateError if it is damaged or cannot be opened."""
        self._path = path
        with self._told():
            private_file(path)
            self._sql = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._sql.execute("PRAGMA synchronous = FULL")
            self._sql.executescript(_SCHEMA)

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._sql.close()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the index for one change; all of it is on disk afterwards, or nothing if anything was raised."""
        with self._told():
            self._sql.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._sql.execute("ROLLBACK")
                raise
            self._sql.execute("COMMIT")

    def entries(self, *, kind: str = "", name: str = "") -> list[Entry]:
        """Return certificates in the order in which they were made; of one kind or name, if given."""
        query = "SELECT * FROM certificates WHERE ? IN ('', kind) AND ? IN ('', name) ORDER BY rowid"
        with self._told():
            return [msgspec.convert(dict(row), prepared(Entry)) for row in self._rows(query, kind, name)]

    def add(self, entry: Entry) -> None:
        """Add a certificate; StateError if its serial number is there."""
        columns = ", ".join(entry.__struct_fields__)
        marks = ", ".join("?" for _ in entry.__struct_fields__)
        with self._told():
            self._sql.execute(
                f"INSERT INTO certificates ({columns}) VALUES ({marks})", msgspec.structs.astuple(entry)
            )

    def revoke(self, serial: str, *, at: int) -> None:
        """Mark a certificate as revoked; a list is to be begun in the same change."""
        with self._told():
            self._sql.execute("UPDATE certificates SET revoked = ? WHERE serial = ?", (at, serial))

    def begin_list(self, *, at: int) -> None:
        """Begin a new list of revoked ones, later than the one before: of two lists OpenSSL takes the later."""
        number, last = self.newest_list()
        with self._told():
            self._sql.execute("INSERT INTO lists VALUES (?, ?)", (number + 1, max(at, last + 1)))

    def newest_list(self) -> tuple[int, int]:
        """Return the number of the newest list, and when it was begun; (0, 0) if there is none."""
        with self._told():
            found = list(self._rows("SELECT number, at FROM lists ORDER BY number DESC LIMIT 1"))
        return (found[0]["number"], found[0]["at"]) if found else (0, 0)

    def _rows(self, query: str, *values: object) -> Iterator[Any]:
        cursor = self._sql.execute(query, values)
        names = [column[0] for column in cursor.description]
        return (dict(zip(names, row, strict=True)) for row in cursor.fetchall())

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, msgspec.ValidationError, UnicodeDecodeError) as exc:
            raise StateError(f"{self._path}: cannot be used: {exc}") from exc
