"""The outbox against real crashes: a killed process, a damaged file, another process at work."""

import os
import signal
import sqlite3
import subprocess
import sys

import children
import pytest

from fleetune.device_runtime.agent.outbox import Entry, MemoryOutbox
from fleetune.device_runtime.agent.outbox_file import OutboxFile, open_outbox
from fleetune.device_runtime.errors import StateError

UPDATE = Entry("job", "t3", "d1", b"header", b"payload")


@pytest.fixture(params=["disk", "memory"])
def again(request, tmp_path):
    """Open the outbox as a device does at each start: what is kept is there again."""
    kept, opened = MemoryOutbox(), []

    def start():
        if request.param == "memory":
            return kept
        for box in opened:
            box.close()
        opened.append(OutboxFile(tmp_path / "box"))
        return opened[-1]

    yield start
    for box in opened:
        box.close()


def test_entries_wait_until_acknowledged(again):
    box = again()
    box.put(UPDATE)
    box.put(UPDATE._replace(digest="d0"))
    assert [e.digest for e in box.pending()] == ["d1", "d0"]
    box = again()
    assert box.pending()[0] == UPDATE
    assert [box.acknowledge("job", "t3", "d1"), box.acknowledge("job", "t3", "d1")] == [True, False]
    assert not box.acknowledge("job", "t4", "d0")
    assert not box.acknowledge("another", "t3", "d0")
    assert [e.digest for e in again().pending()] == ["d0"]


def test_putting_twice_is_putting_once(again):
    box = again()
    box.put(UPDATE)
    box.put(UPDATE._replace(payload=b"other"))
    assert box.pending() == [UPDATE]


def test_facts_are_replaced_and_forgotten(again):
    assert again().recall("id") is None
    again().remember("id", b"a")
    again().put(UPDATE, facts={"id": b"", "offer": b"x"})
    assert (again().recall("id"), again().recall("offer")) == (b"", b"x")
    again().forget("id")
    again().forget("never there")
    assert (again().recall("id"), again().recall("offer")) == (None, b"x")


def test_an_entry_and_its_facts_are_one_transaction(tmp_path):
    with OutboxFile(tmp_path / "box") as box:
        with pytest.raises(StateError):
            box.put(UPDATE, facts={"offer": b"x", "wrong": None})  # NOT NULL
        assert (box.pending(), box.recall("offer")) == ([], None)
        box.put(UPDATE, facts={"offer": b"x"})
        assert (box.pending(), box.recall("offer")) == ([UPDATE], b"x")


CRASH = """
import sys
from fleetune.device_runtime.agent.outbox import Entry
from fleetune.device_runtime.agent.outbox_file import OutboxFile, open_outbox
box = OutboxFile(sys.argv[1])
for number in range(10_000):
    box.put(Entry("job", f"t{number}", "d", b"header", bytes(50_000)), facts={"last": b"%d" % number})
    print(number, flush=True)
"""


def test_what_was_put_survives_a_kill(tmp_path):
    path = tmp_path / "box"
    process = children.start([sys.executable, "-c", CRASH, path], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()
    with OutboxFile(path) as box:
        tasks = [entry.task_id for entry in box.pending()]
        assert tasks == [f"t{i}" for i in range(len(tasks))]
        assert len(tasks) >= len(said)  # what the process said was put, is there
        assert box.recall("last") == b"%d" % (len(tasks) - 1)
        assert box.pending()[-1].payload == bytes(50_000)


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\xff" * 4000])
def test_a_foreign_file_is_a_clear_error(tmp_path, content):
    (tmp_path / "box").write_bytes(content)
    with pytest.raises(StateError, match=r"box: damaged"):
        OutboxFile(tmp_path / "box")


def test_a_damaged_page_is_a_clear_error(tmp_path):
    path = tmp_path / "box"
    with OutboxFile(path) as box:
        for number in range(20):
            box.put(UPDATE._replace(task_id=f"t{number}", payload=bytes(9000)))
    content = bytearray(path.read_bytes())
    content[4096 : 4096 * 6] = b"\xa5" * (4096 * 5)
    path.write_bytes(content)
    with pytest.raises(StateError, match="box"):
        OutboxFile(path)


def test_a_folder_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(StateError, match="cannot be written: No such file"):
        OutboxFile(tmp_path / "nowhere" / "box")


def test_the_file_is_written_ahead_and_synchronised(tmp_path):
    with OutboxFile(tmp_path / "box") as box:
        assert box._database.execute("PRAGMA synchronous").fetchone() == (2,)
    other = sqlite3.connect(tmp_path / "box")
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    other.close()


SCHEMA_OF_0_1 = """
CREATE TABLE entries (
    job TEXT NOT NULL, round INTEGER NOT NULL, digest TEXT NOT NULL, header BLOB NOT NULL, payload BLOB NOT NULL,
    PRIMARY KEY (job, round, digest)
);
CREATE TABLE facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""


def test_an_outbox_of_0_1_is_taken_over_in_its_order(tmp_path):
    with sqlite3.connect(tmp_path / "box") as old:
        old.executescript(SCHEMA_OF_0_1)
        rows = [("job", 2, "d2", b"h2", b"p2"), ("job", 1, "d1", b"h1", b"p1")]
        old.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?)", rows)
        old.execute("INSERT INTO facts VALUES ('device_id', X'61')")
    for _ in range(2):
        with OutboxFile(tmp_path / "box") as box:
            wanted = [Entry("job", f"round-{n}", f"d{n}", b"h%d" % n, b"p%d" % n) for n in (2, 1)]
            assert box.pending() == wanted
            assert box.recall("device_id") == b"a"
    with OutboxFile(tmp_path / "box") as box:
        assert box.acknowledge("job", "round-2", "d2")


@pytest.mark.parametrize("value", [5, "text", 1.5])
def test_values_of_another_kind_are_a_clear_error(tmp_path, value):
    with OutboxFile(tmp_path / "box") as box:
        box.put(UPDATE, facts={"device_id": b"a"})
        box._database.execute("UPDATE facts SET value = ?", (value,))
        box._database.execute("UPDATE deliveries SET header = ?", (value,))
        with pytest.raises(StateError, match="box: damaged: device_id is no bytes; move it away"):
            box.recall("device_id")
        with pytest.raises(StateError, match="box: damaged: a delivery that is none"):
            box.pending()


def test_a_name_that_is_no_text_is_a_clear_error(tmp_path):
    with OutboxFile(tmp_path / "box") as box:
        box.put(UPDATE)
        box._database.execute("UPDATE deliveries SET task_id = CAST(X'FF' AS TEXT)")
        with pytest.raises(StateError, match="box"):
            box.pending()


def test_a_damaged_outbox_is_set_aside_and_the_device_goes_on(tmp_path, caplog):
    path = tmp_path / "outbox.sqlite"
    with OutboxFile(path) as whole:
        whole.put(UPDATE)
    sql = sqlite3.connect(path)
    sql.execute("UPDATE deliveries SET header = 5")
    sql.commit()
    sql.close()
    with pytest.raises(StateError, match=r"outbox\.sqlite: damaged: a delivery that is none; move it away"):
        OutboxFile(path)
    with open_outbox(path) as fresh:
        assert fresh.pending() == []
        fresh.put(UPDATE)
    assert (tmp_path / "outbox.sqlite.aside").exists()
    assert "set aside as outbox.sqlite.aside" in caplog.text
    with open_outbox(path) as again:
        assert again.pending() == [UPDATE]


def test_an_outbox_that_another_process_locks_is_not_damaged(tmp_path, monkeypatch):
    path = tmp_path / "outbox.sqlite"
    OutboxFile(path).close()
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **o: connect(*a, **{**o, "timeout": 0.0}))
    other = connect(path)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StateError, match="cannot be used: database is locked"):
        open_outbox(path)
    assert not (tmp_path / "outbox.sqlite.aside").exists()
    other.close()
