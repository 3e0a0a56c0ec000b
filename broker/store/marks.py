"""Marks: what a job notes against a device, and what its operator forgives; a log that nothing is taken out of."""

import sqlite3
from collections.abc import Iterable
from typing import Annotated

import msgspec

from fleetune.broker.tasks import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import Count, Word
from fleetune.device_runtime.errors import one_line

WEIGHT, LENGTH = "weight", "length"
"""Its update weighed less than it said; it moved the model less than it would have."""
FAR, REFUSED = "far-off", "refused"
"""Its update was many times longer than the others of the round, and left out; its update could not be one."""
HELD = (WEIGHT, LENGTH, FAR)
"""Marks of updates that counted for less than they said, or not at all."""
PARDONED = "pardoned"
"""The operator forgives all that was before."""
STRIKES = (FAR, REFUSED)
"""Marks that a device is left out for, when it has too many of them."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS marks (number INTEGER PRIMARY KEY, round INTEGER NOT NULL, device TEXT NOT NULL, kind TEXT NOT NULL,
                                  detail TEXT NOT NULL, UNIQUE (round, device, kind))
"""
"""Ledgers of earlier releases get it when they are opened; a release that does not know it leaves it alone."""

_Detail = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]


class Mark(msgspec.Struct, frozen=True):
    """One note about one device; of a kind one a round."""

    round: Count
    """The open round, or the last one closed."""
    device: Word
    kind: Word
    detail: _Detail = ""
    """In words; printable."""


def mark(round_number: int, device: str, kind: str, detail: str = "") -> Mark:
    """Make a mark; of ``detail`` what fits in a line is kept."""
    return Mark(round_number, device, kind, one_line(detail, length_max=REASON_CHARS_MAX))


def add_marks(sql: sqlite3.Connection, marks: Iterable[Mark]) -> int:
    """Insert marks, but those that are there, and return how many. The caller commits."""
    rows = [(one.round, one.device, one.kind, one.detail) for one in marks]
    return (
        sql.executemany("INSERT OR IGNORE INTO marks VALUES (NULL, ?, ?, ?, ?)", rows).rowcount if rows else 0
    )


def read_marks(sql: sqlite3.Connection) -> list[Mark]:
    """All marks in the order in which they were made; MsgspecError if one is not what was written."""
    rows = sql.execute("SELECT round, device, kind, detail FROM marks ORDER BY number").fetchall()
    return [Mark(*row) for row in msgspec.convert(rows, list[tuple[Count, Word, Word, _Detail]])]


def count_held(sql: sqlite3.Connection, round_number: int) -> int:
    """How many devices' updates of a round counted for less than they said, or not at all."""
    query = "SELECT count(DISTINCT device) FROM marks WHERE round = ? AND kind IN (?, ?, ?)"
    found: int = sql.execute(query, (round_number, *HELD)).fetchone()[0]
    return found
