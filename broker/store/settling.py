"""Rounds that are long over are settled: of a version one line stays, of a device what later rounds go by, and their rows go.

What stays: version 0; each device's number of turns (the privacy accountant's) and last accepted update; what all settled
rounds cost, by device, under BEFORE; and of the settled versions at most so many lines, evenly spaced. Everything in one
transaction, and the same after a SIGKILL.
"""

import sqlite3
from collections.abc import Collection, Iterable

from fleetune.broker.store.costs import fold_costs
from fleetune.broker.store.marks import forget_marks
from fleetune.broker.store.store import Line

SCHEMA = (
    "CREATE TABLE IF NOT EXISTS lines (version INTEGER PRIMARY KEY, turns INTEGER NOT NULL, line TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS settled_devices (device TEXT PRIMARY KEY, turns INTEGER NOT NULL, digest TEXT NOT NULL)",
)
AT_ONCE = 16
"""Fewer versions are not settled: a transaction waits for the disk."""
MOST_AT_ONCE = 64
"""Of a ledger that has many to settle, in one round."""
_TURNS = """
INSERT INTO settled_devices
SELECT device, count(DISTINCT round), '' FROM tasks LEFT JOIN declines USING (task_id)
WHERE declines.number IS NULL AND round <= ? GROUP BY device
ON CONFLICT (device) DO UPDATE SET turns = turns + excluded.turns
"""
_LAST_UPDATES = """
INSERT INTO settled_devices
SELECT device, 0, digest FROM (SELECT device, digest, max(updates.number) FROM tasks JOIN updates USING (task_id)
                               WHERE round <= ? GROUP BY device) WHERE true
ON CONFLICT (device) DO UPDATE SET digest = excluded.digest
"""
_OF_TASKS = "WHERE task_id IN (SELECT task_id FROM tasks WHERE round <= ?)"
_GO = (
    f"DELETE FROM updates {_OF_TASKS}",
    f"DELETE FROM declines {_OF_TASKS}",
    "DELETE FROM tasks WHERE round <= ?",
)
_FREE_PAGES = 1024
"""Free pages of a database that may be a part of its file."""
_PAGES_AT_ONCE = 256


def settle(sql: sqlite3.Connection, lines: Iterable[tuple[int, str]], *, most: int) -> None:
    """Settle versions, in their order, each with its line; at most ``most`` lines stay, and the newest. The caller commits."""
    for version, text in lines:
        number = sql.execute("SELECT round FROM versions WHERE version = ?", (version,)).fetchone()[0]
        for statement in (_TURNS, _LAST_UPDATES, *_GO):
            sql.execute(statement, (number,))
        fold_costs(sql, number)
        forget_marks(sql, number)
        sql.execute("DELETE FROM evaluations WHERE version = ?", (version,))
        sql.execute(
            "INSERT INTO lines SELECT ?, coalesce(max(turns), 0), ? FROM settled_devices", (version, text)
        )
    last = settled_to(sql)
    sql.execute("DELETE FROM lines WHERE version % ? <> 0 AND version < ?", (stride(last, most), last))
    sql.execute("DELETE FROM works WHERE number NOT IN (SELECT work FROM tasks)")


def forget_versions(sql: sqlite3.Connection, *, but: Collection[int]) -> None:
    """Delete the rows of settled versions, but for version 0, the newest and those whose files are kept. The caller commits."""
    query = "SELECT version FROM versions WHERE version > 0 AND version < ?"
    found = [version for (version,) in sql.execute(query, (settled_to(sql),)) if version not in but]
    sql.executemany("DELETE FROM versions WHERE version = ?", [(version,) for version in found])


def settled_to(sql: sqlite3.Connection) -> int:
    """The newest version that is settled; 0 if none is."""
    found: int = sql.execute("SELECT coalesce(max(version), 0) FROM lines").fetchone()[0]
    return found


def line(sql: sqlite3.Connection, version: int) -> Line | None:
    """What stays of a settled version; None if nothing does."""
    found = sql.execute("SELECT turns, line FROM lines WHERE version = ?", (version,)).fetchone()
    return Line(*found) if found else None


def stride(count: int, most: int) -> int:
    """The least power of two of which 1 to ``count`` has at most ``most`` multiples."""
    every = 1
    while count // every > most:
        every *= 2
    return every


def give_back(sql: sqlite3.Connection) -> None:
    """Make the file smaller by some of its free pages, if there are many; of a ledger of an earlier release they stay."""
    if sql.execute("PRAGMA freelist_count").fetchone()[0] > _FREE_PAGES:
        sql.executescript(
            f"PRAGMA incremental_vacuum({_PAGES_AT_ONCE})"
        )  # execute would take one of its steps alone
