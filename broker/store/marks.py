"""The marks of a ledger: what a job notes against a device, and what its operator forgives."""

import sqlite3
from collections.abc import Iterable
from typing import Annotated

import msgspec

from fleetune.broker.tasks import HELD, REASON_CHARS_MAX, Mark
from fleetune.device_runtime.contracts.fields import Count, Word
from fleetune.device_runtime.prepared import prepared

SCHEMA = """
CREATE TABLE IF NOT EXISTS marks (number INTEGER PRIMARY KEY, round INTEGER NOT NULL, device TEXT NOT NULL, kind TEXT NOT NULL,
                                  detail TEXT NOT NULL, UNIQUE (round, device, kind))
"""
MARK_ROUNDS = 64
"""Marks of so many rounds say who is left out now: a term and the window before it are over after 42."""

_Detail = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]


def add_marks(sql: sqlite3.Connection, marks: Iterable[Mark]) -> int:
    """Insert marks, but those that are there, and return how many. The caller commits."""
    rows = [(one.round, one.device, one.kind, one.detail) for one in marks]
    return (
        sql.executemany("INSERT OR IGNORE INTO marks VALUES (NULL, ?, ?, ?, ?)", rows).rowcount if rows else 0
    )


def read_marks(sql: sqlite3.Connection) -> list[Mark]:
    """All marks in the order in which they were made; MsgspecError if one is not what was written."""
    rows = sql.execute("SELECT round, device, kind, detail FROM marks ORDER BY number").fetchall()
    return [Mark(*row) for row in msgspec.convert(rows, prepared(list[tuple[Count, Word, Word, _Detail]]))]


def forget_marks(sql: sqlite3.Connection, round_number: int) -> None:
    """Delete the marks of a round and those before, but those that still tell. The caller commits."""
    query = "DELETE FROM marks WHERE round <= min(?, (SELECT max(round) FROM versions) - ?)"
    sql.execute(query, (round_number, MARK_ROUNDS))


def count_held(sql: sqlite3.Connection, round_number: int) -> int:
    """How many devices' updates of a round counted for less than they said, or not at all."""
    kinds = ", ".join("?" * len(HELD))
    query = f"SELECT count(DISTINCT device) FROM marks WHERE round = ? AND kind IN ({kinds})"
    found: int = sql.execute(query, (round_number, *HELD)).fetchone()[0]
    return found
