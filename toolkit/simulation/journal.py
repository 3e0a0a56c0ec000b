"""What workers have done, on disk: a simulation that was killed is replayed, and does none of it again."""

import sqlite3
from pathlib import Path

import msgspec

from fleetune.device_runtime.errors import ConfigError, StateError, one_line
from fleetune.toolkit.simulation.jobs import Done, Task, decode_done, encode

JOURNAL = "journal.sqlite"
_DAMAGES = (
    sqlite3.Error,
    msgspec.MsgspecError,
    OSError,
    ValueError,
    TypeError,
    OverflowError,
    RecursionError,
)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS simulation (digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS done (key TEXT PRIMARY KEY, device TEXT, kind TEXT, round INTEGER, content BLOB) WITHOUT ROWID;
"""


class Journal:
    """Results by the digest of their task. A kill of the process loses none that was kept."""

    def __init__(self, folder: Path, digest: str) -> None:
        """Open or begin; ``digest`` is that of the simulation.

        Raises:
            ConfigError: the folder holds another simulation.
            StateError: the journal is damaged, or cannot be written.
        """
        self._path = folder / JOURNAL
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sql = sqlite3.connect(self._path, isolation_level=None)
        except (sqlite3.Error, OSError) as exc:
            raise self._unusable(exc) from exc
        try:
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL"):
                self._sql.execute(f"PRAGMA {pragma}")
            self._sql.executescript(_SCHEMA)
            found = self._sql.execute("SELECT digest FROM simulation").fetchone()
            if found is None:
                self._sql.execute("INSERT INTO simulation VALUES (?)", (digest,))
        except _DAMAGES as exc:
            self._sql.close()
            raise self._unusable(exc) from exc
        if found and found[0] != digest:
            self._sql.close()
            raise ConfigError(
                f"{folder}: another simulation lies there (configuration, artifact or data differ); give another --out"
            )

    def close(self) -> None:
        """Give the file back."""
        self._sql.close()

    def find(self, task: Task) -> Done | None:
        """What came of a task in an earlier life, or None; StateError if it cannot be read."""
        try:
            found = self._sql.execute("SELECT content FROM done WHERE key = ?", (task.key,)).fetchone()
            return decode_done(found[0]) if found else None
        except _DAMAGES as exc:
            raise self._unusable(exc) from exc

    def keep(self, task: Task, done: Done) -> None:
        """Keep what came of a task; StateError if it cannot be written."""
        row = (task.key, task.device, task.kind, task.work.rounds_before + 1, encode(done))
        try:
            self._sql.execute("INSERT OR REPLACE INTO done VALUES (?, ?, ?, ?, ?)", row)
        except sqlite3.Error as exc:
            raise StateError(f"{self._path}: cannot be written: {one_line(exc)}") from exc

    @property
    def size(self) -> int:
        """How many results it holds; StateError if it cannot be read."""
        try:
            return int(self._sql.execute("SELECT count(*) FROM done").fetchone()[0])
        except _DAMAGES as exc:
            raise self._unusable(exc) from exc

    def _unusable(self, exc: Exception) -> StateError:
        return StateError(
            f"{self._path}: damaged, or cannot be used: {one_line(exc)}; move it away to begin anew"
        )
