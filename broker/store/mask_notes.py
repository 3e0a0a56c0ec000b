"""What a round under masks goes by, in its ledger's database: kept until the round is closed, then gone."""

import sqlite3
from hashlib import sha256
from typing import Annotated

import msgspec

from fleetune.broker.tasks import Note
from fleetune.device_runtime.contracts.fields import MESSAGE_BYTES_MAX, Count, Word
from fleetune.device_runtime.prepared import prepared

SCHEMA = """
CREATE TABLE IF NOT EXISTS mask_notes (number INTEGER PRIMARY KEY, round INTEGER NOT NULL, kind TEXT NOT NULL,
                                       device TEXT NOT NULL, content BLOB NOT NULL)
"""
_DIGEST_BYTES = 16
_FIRST = "first"
"""Kind of the note that says from which task on a round counts."""
_Content = Annotated[bytes, msgspec.Meta(max_length=64 * MESSAGE_BYTES_MAX)]
_Row = tuple[Word, Word, _Content]


def add_note(sql: sqlite3.Connection, round_number: int, note: Note) -> None:
    """Insert a note. The caller commits."""
    row = (round_number, note.kind, note.device_id, _digest(note) + note.content)
    sql.execute("INSERT INTO mask_notes VALUES (NULL, ?, ?, ?, ?)", row)


def begin_anew(sql: sqlite3.Connection, round_number: int, first: int) -> None:
    """Delete a round's notes, and leave its updates so far to version 0, which has none. The caller commits."""
    forget_notes(sql, round_number)
    add_note(sql, round_number, Note(_FIRST, "", str(first).encode()))
    sql.execute("UPDATE updates SET made = 0 WHERE made IS NULL")


def forget_notes(sql: sqlite3.Connection, round_number: int) -> None:
    """Delete the notes of a round and those before. The caller commits."""
    sql.execute("DELETE FROM mask_notes WHERE round <= ?", (round_number,))


def first_and_notes(sql: sqlite3.Connection, closed: int) -> tuple[int, tuple[Note, ...]]:
    """Position from which the tasks of the open round count, and its notes; MsgspecError or ValueError if they are damaged."""
    query = "SELECT kind, device, content FROM mask_notes WHERE round > ? ORDER BY number"
    rows = msgspec.convert(sql.execute(query, (closed,)).fetchall(), prepared(list[_Row]))
    found = [_checked(*row) for row in rows]
    first = [msgspec.convert(int(note.content), prepared(Count)) for note in found if note.kind == _FIRST]
    return max(first, default=0), tuple(note for note in found if note.kind != _FIRST)


def _checked(kind: str, device_id: str, content: bytes) -> Note:
    note = Note(kind, device_id, content[_DIGEST_BYTES:])
    if _digest(note) != content[:_DIGEST_BYTES]:
        raise ValueError(f"a note of masks ({kind!r} of {device_id!r}) is not what was written")
    return note


def _digest(note: Note) -> bytes:
    same = msgspec.msgpack.encode((note.kind, note.device_id, note.content))
    return sha256(same).digest()[:_DIGEST_BYTES]
