"""What a round under masks goes by: in both stores the same, gone when the round is closed, and refused when it is damaged."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from rounds_by_hand import job, task, update_of

from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.tasks import Note
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.errors import StateError

ADAPTER = to_bytes({"w": np.zeros(2, np.float32)})
NOTES = [Note("mask_keys", "a", b"keys"), Note("members", "", b"\x91\xa1a"), Note("mask_keys", "b", b"")]


@pytest.fixture(params=["ledger", "memory"])
def store(request, tmp_path):
    if request.param == "memory":
        found = MemoryStore()
        found.add_version(0, ADAPTER, round_number=0)
        yield found
    else:
        with Ledger(tmp_path, job()) as found:
            found.add_version(0, ADAPTER, round_number=0)
            yield found


def test_notes_are_kept_in_their_order_until_the_round_is_closed(store):
    store.enrol([task("a", 1)])
    for note in NOTES:
        store.note(1, note)
    assert store.past().notes == tuple(NOTES)
    assert store.past().first == 0
    store.add_version(1, ADAPTER, round_number=1)
    assert store.past().notes == ()


def test_a_round_that_begins_anew_has_no_notes_and_no_updates(store):
    first, second = task("a", 1, 0), task("b", 1, 1)
    store.enrol([first, second])
    store.accept(update_of(first, b"payload"), b"payload")
    store.note(1, NOTES[0])
    store.repeat(1, 2)
    again = task("a", 1, 2)._replace(task_id="train-1-a-2")
    store.enrol([again])
    store.note(1, NOTES[1])
    assert (store.past().first, store.past().notes) == (2, (NOTES[1],))
    store.accept(update_of(again, b"other"), b"other")
    assert [payload for *_, payload in store.accepted()] == [b"other"]
    store.add_version(1, ADAPTER, round_number=1)
    assert store.past().first == 0
    assert [len(store.figures(version).trained) for version in (0, 1)] == [0, 1]


def test_a_ledger_without_notes_is_opened_and_has_none(tmp_path):
    with Ledger(tmp_path, job()) as ledger:
        assert ledger.past().notes == ()
        ledger.add_version(0, ADAPTER, round_number=0)


@pytest.mark.parametrize("column", ["kind", "device", "content"])
def test_a_damaged_note_is_refused_in_one_line(tmp_path, column):
    with Ledger(tmp_path, job()) as ledger:
        ledger.add_version(0, ADAPTER, round_number=0)
        ledger.enrol([task("a", 1)])
        ledger.note(1, NOTES[0])
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as sql, sql:
        sql.execute(
            f"UPDATE mask_notes SET {column} = CAST('x' || {column} AS {'BLOB' if column == 'content' else 'TEXT'})"
        )
    with (
        Ledger(tmp_path, job()) as ledger,
        pytest.raises(StateError, match="is not what was written") as caught,
    ):
        ledger.past()
    assert "\n" not in str(caught.value)
