"""A ledger that was damaged or edited is refused when it is opened, or read, in one line that names it."""

import sqlite3
from pathlib import Path
from typing import Annotated

import msgspec

from fleetune.broker.store.rows import Row
from fleetune.device_runtime.contracts.fields import FIGURE_MAX, Count, Share, TaskId, Word
from fleetune.device_runtime.errors import StateError, one_line
from fleetune.device_runtime.prepared import prepared

_Size = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]
_Loss = Annotated[float, msgspec.Meta(ge=-FIGURE_MAX, le=FIGURE_MAX)]
DAMAGES = (sqlite3.Error, msgspec.MsgspecError, ValueError, TypeError, OverflowError)
"""What comes of reading rows that nobody of us wrote; text that is not UTF-8 is a ValueError."""

_COLUMNS = {
    "SELECT version, round, sha256, state FROM versions": tuple[Count, Count, Word, Word],
    "SELECT task_id, device, digest, num_samples, stats, file FROM updates JOIN tasks USING (task_id)": tuple[
        str, str, Word, Count, str, str
    ],
    "SELECT task_id, updates, cause, reason FROM declines": tuple[TaskId, Count, Word, str],
    "SELECT version, device, loss, accuracy, num_samples FROM evaluations": tuple[
        Count, str, _Loss, Share, int
    ],
    "SELECT round, bytes_down, bytes_up, bytes_sent, bytes_received, seconds FROM costs": tuple[
        int, _Size, _Size, _Size, _Size, _Seconds
    ],
    "SELECT round, device, kind, detail FROM marks": tuple[Count, Word, Word, str],
    "SELECT turns, device, digest FROM settled_devices": tuple[Count, Word, str],
    "SELECT version, turns FROM lines": tuple[Count, Count],
    "SELECT * FROM carried": tuple[int, str, _Size, _Size, _Size, _Size, _Size, _Size, _Size, _Size],
}
"""What the rows of each query are made of."""
_LAST = "(SELECT coalesce(max(version), -1) FROM lines)"
_TIES = {
    "SELECT count(*) FROM versions a JOIN versions b ON b.version = a.version + 1 WHERE b.round < a.round": "rounds go back",
    f"SELECT coalesce(max(version), {_LAST}) - {_LAST} - count(*) FROM versions WHERE version > {_LAST}": "versions are missing",
    "SELECT max(version) >= (SELECT max(version) FROM versions) FROM lines": "versions are missing",
    "SELECT count(*) FROM updates WHERE task_id NOT IN (SELECT task_id FROM tasks)": "updates of no task",
    "SELECT count(*) FROM updates WHERE made NOT IN (SELECT version FROM versions)": "updates of no version",
    "SELECT count(*) FROM declines WHERE task_id NOT IN (SELECT task_id FROM tasks)": "declines of no task",
    "SELECT count(*) FROM evaluations WHERE version NOT IN (SELECT version FROM versions)": "evaluations of no version",
    "SELECT count(*) FROM tasks WHERE work NOT IN (SELECT number FROM works)": "tasks without their work",
    "SELECT count(*) FROM tasks WHERE version NOT IN (SELECT version FROM versions)": "tasks of no version",
    "SELECT count(*) FROM tasks WHERE round > (SELECT max(round) FROM versions)"
    " AND version <> (SELECT max(version) FROM versions)": "an open round that starts from another version than the newest",
    "SELECT count(DISTINCT round) > 1 FROM tasks WHERE round > (SELECT max(round) FROM versions)": "two rounds are open",
}
"""Queries that give 0, or nothing, unless the sentence is true."""

_OF_THE_DISK = ("disk is full", "readonly", "unable to open")


def check_damage(sql: sqlite3.Connection) -> None:
    """Look at every row of a ledger of this format once.

    Raises:
        ValueError: what is wrong; or another of DAMAGES.
    """
    if (found := sql.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
        raise ValueError(found)
    for query, row in _COLUMNS.items():
        msgspec.convert(sql.execute(query).fetchall(), prepared(list[row]))  # type: ignore[valid-type]
    for (text,) in sql.execute("SELECT line FROM lines"):
        msgspec.json.decode(text, type=prepared(Row))
    for query, sentence in _TIES.items():
        if sql.execute(query).fetchone()[0]:
            raise ValueError(sentence)


def damaged(path: Path, exc: Exception) -> StateError:
    """Say that a ledger cannot be used, and what to do; a disk that is full damages nothing."""
    said = one_line(exc)
    if isinstance(exc, sqlite3.OperationalError) and any(part in said for part in _OF_THE_DISK):
        return StateError(
            f"{path}: cannot be used: {said}; the same command resumes the job once it can be written"
        )
    return StateError(f"{path}: not a ledger, or damaged: {said}; put a copy back, or give another --out")
