import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import children
import pytest
from paths import ROOT
from rounds_by_hand import job, task, update_of

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.store import Arrival
from fleetune.device_runtime import arrays
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import ConfigError, StateError

SETTINGS = job()
A, B = task("a", 1, 0), task("b", 1, 1)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path, SETTINGS) as opened:
        opened.add_version(0, b"zero", round_number=0)
        opened.enrol([A, B])
        yield opened


def test_payloads_go_when_their_round_closes(ledger):
    ledger.accept(update_of(A, b"x"), b"x")
    assert [path.name for path in (ledger.folder / "updates").iterdir()] == ["train-1-a.bin"]
    ledger.add_version(1, b"one", round_number=1)
    assert list((ledger.folder / "updates").iterdir()) == []


def test_a_ledger_in_which_nothing_has_happened_takes_any_settings(tmp_path):
    Ledger(tmp_path, SETTINGS).close()
    other = Settings(job="j", artifact="b" * 64, rounds=2, clients=3, min_clients=2)
    with Ledger(tmp_path, other) as opened:
        opened.add_version(0, b"zero", round_number=0)
    with pytest.raises(ConfigError, match="holds another job"):
        Ledger(tmp_path, SETTINGS)


def test_another_job_is_refused_with_what_differs(ledger):
    ledger.close()
    other = Settings(job="j", artifact="b" * 64, rounds=2, clients=3, min_clients=2)
    with pytest.raises(ConfigError) as caught:
        Ledger(ledger.folder, other)
    assert "clients: 3, was 2" in str(caught.value)
    assert "artifact: 'bbb" in str(caught.value)


def test_two_aggregators_do_not_share_a_ledger(ledger):
    with pytest.raises(ConfigError, match="another aggregator is at work here"):
        Ledger(ledger.folder, SETTINGS)
    ledger.close()
    Ledger(ledger.folder, SETTINGS).close()


def test_a_refused_ledger_is_given_back(ledger):
    ledger.close()
    with pytest.raises(ConfigError):
        Ledger(ledger.folder, job(clients=9))
    Ledger(ledger.folder, SETTINGS).close()


_READER = """
import sqlite3, sys
sql = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True)
print(sql.execute("SELECT count(*) FROM tasks").fetchone()[0])
"""


def test_another_process_reads_it_while_it_is_written(ledger):
    def read():
        command = [sys.executable, "-c", _READER, str(ledger.folder / LEDGER)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert read() == "2\n"
    ledger.enrol([task("c", 1, 2)])
    assert read() == "3\n"
    ledger.close()
    assert read() == "3\n"


def test_a_reader_in_the_middle_of_its_reading_does_not_stop_the_aggregator(ledger):
    reader = sqlite3.connect(f"file:{ledger.folder / LEDGER}?mode=ro", uri=True)
    rows = reader.execute("SELECT task_id FROM tasks")
    rows.fetchone()
    ledger.accept(update_of(A, b"x"), b"x")
    ledger.add_version(1, b"one", round_number=1)
    reader.close()
    assert ledger.newest == 1


def test_every_commit_waits_for_the_disk(ledger):
    (level,) = ledger._sql.execute("PRAGMA synchronous").fetchone()
    assert level == 2, "FULL: loss of power takes nothing that was acknowledged"


def test_a_payload_is_synced_with_its_folder_before_the_row_that_names_it(ledger, monkeypatch):
    synced = []

    def spy(handle, fsync=os.fsync):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        assert ledger._sql.in_transaction, "nothing names it before"
        fsync(handle)

    monkeypatch.setattr(arrays.os, "fsync", spy)
    ledger.accept(update_of(A, b"x"), b"x")
    assert sorted(synced) == ["train-1-a.bin", "updates"]
    assert [a.payload for a in ledger.accepted()] == [b"x"]


def test_payloads_that_come_together_lie_in_one_file_and_are_read_apart(ledger):
    ledger.accept_all([Arrival(update_of(A, b"first"), b"first"), Arrival(update_of(B, b"2"), b"2")])
    assert [path.name for path in (ledger.folder / "updates").iterdir()] == ["train-1-a.bin"]
    assert [a.payload for a in ledger.accepted()] == [b"first", b"2"]


def test_a_place_that_is_none_is_damage(ledger):
    ledger.accept(update_of(A, b"x"), b"x")
    ledger._sql.execute("UPDATE updates SET file = 'train-1-a.bin@0+x'")
    with pytest.raises(StateError, match="damaged"):
        list(ledger.accepted())


@pytest.mark.parametrize("content", [b"x" * 8192, b"SQLite format 3\0" + b"\xff" * 8192])
def test_a_damaged_ledger_is_named(tmp_path, content):
    (tmp_path / LEDGER).write_bytes(content)
    with pytest.raises(StateError, match=r"ledger\.sqlite: not a ledger, or damaged"):
        Ledger(tmp_path, SETTINGS)


def test_a_ledger_of_another_format_is_refused_with_the_next_step(ledger):
    ledger._sql.execute("UPDATE job SET format = 9")
    ledger._sql.commit()
    ledger.close()
    with pytest.raises(
        StateError, match="format 9; this version reads 1 to 5: use the fleetune that wrote it"
    ):
        Ledger(ledger.folder, SETTINGS)


def test_a_payload_that_changed_on_disk_is_named(ledger):
    ledger.accept(update_of(A, b"good"), b"good")
    next((ledger.folder / "updates").iterdir()).write_bytes(b"evil")
    with pytest.raises(StateError, match=r"train-1-a\.bin: SHA-256"):
        list(ledger.accepted())
    (ledger.folder / "versions" / "00000.safetensors").unlink()
    with pytest.raises(StateError, match="cannot be read"):
        ledger.version(0)


def test_what_a_killed_writer_left_goes_when_the_ledger_is_opened(ledger):
    ledger.close()
    left = ledger.folder / "updates" / ".train-1-a.bin.4711.part"
    left.write_bytes(b"half")
    Ledger(ledger.folder, SETTINGS).close()
    assert not left.exists()


_CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_ledger import A, B, SETTINGS, update_of
from fleetune.broker.store.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), SETTINGS)
ledger.add_version(0, b"zero", round_number=0)
ledger.enrol([A, B])
ledger.accept(update_of(A, b"kept"), b"kept")
sys.stdout.write("acknowledged\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_what_was_acknowledged_survives_a_sigkill(tmp_path):
    command = [
        sys.executable,
        "-c",
        _CHILD,
        str(tmp_path),
        str(Path(__file__).parent),
        str(ROOT / "tests/support"),
    ]
    with children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"acknowledged\n"
        os.kill(child.pid, signal.SIGKILL)
    with Ledger(tmp_path, SETTINGS) as ledger:
        assert ledger.past().tasks == (A, B)
        assert [a.payload for a in ledger.accepted()] == [b"kept"]
