import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import children
import pytest
from rounds_by_hand import job, report

from fleetune.broker.job import Settings
from fleetune.broker.ledger import FILE, Cost, Ledger
from fleetune.device_runtime.contracts.wire import TransferManifest, UpdateReady
from fleetune.device_runtime.errors import ConfigError, StateError, WireError

SETTINGS = job()


def update(device, round_number, payload, *, num_samples=10, loss=None):
    manifest = TransferManifest(
        size_bytes=len(payload), chunk_bytes=1024, chunk_digests=b"", sha256=sha256(payload).hexdigest()
    )
    return UpdateReady(
        device_id=device,
        job="j",
        round=round_number,
        version=round_number - 1,
        codec="fp32",
        num_samples=num_samples,
        payload=manifest,
        stats={} if loss is None else {"loss": loss},
    )


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path, SETTINGS) as opened:
        opened.add_version(0, b"zero")
        yield opened


def reopened(ledger):
    ledger.close()
    return Ledger(ledger.folder, SETTINGS)


def test_a_new_ledger_has_no_past(ledger):
    past = ledger.past()
    assert (past.version, past.asked, dict(past.accepted), past.reported, past.finished) == (
        0,
        (),
        {},
        frozenset(),
        False,
    )


def test_everything_survives_reopening(ledger):
    ledger.ask(1, ("b", "a"))
    ledger.ask(1, ("c",))
    ledger.accept(update("a", 1, b"payload"), b"payload")
    ledger.report(report("e", 0, loss=2.0, accuracy=0.25, num_samples=4))
    again = reopened(ledger)
    past = again.past()
    assert past.asked == ("b", "a", "c")
    assert past.accepted == {(1, "a"): sha256(b"payload").hexdigest()}
    assert past.reported == {(0, "e")}
    assert [tuple(a) for a in again.accepted(1)] == [("a", 10, b"payload")]
    assert again.version(0) == b"zero"
    again.finish()
    assert reopened(again).past().finished


def test_closing_a_round_keeps_versions_and_deletes_payloads(ledger):
    ledger.ask(1, ("a",))
    ledger.accept(update("a", 1, b"x"), b"x")
    ledger.add_version(1, b"one", memory=b"momentum")
    assert list((ledger.folder / "updates").iterdir()) == []
    assert (ledger.version(0), ledger.version(1), ledger.memory(1), ledger.memory(0)) == (
        b"zero",
        b"one",
        b"momentum",
        b"",
    )
    past = ledger.past()
    assert (past.version, past.asked) == (1, ())
    assert past.accepted, "who was accepted is known for ever"


def test_a_device_is_counted_once_a_round(ledger):
    ledger.accept(update("a", 1, b"x"), b"x")
    with pytest.raises(WireError, match="device 'a' has an update in round 1 already"):
        ledger.accept(update("a", 1, b"y"), b"y")
    assert [a.payload for a in ledger.accepted(1)] == [b"x"]


def test_rows_weigh_by_samples(ledger):
    ledger.accept(update("a", 1, b"x", num_samples=1, loss=4.0), b"x")
    ledger.accept(update("b", 1, b"y", num_samples=3, loss=0.0), b"y")
    ledger.accept(update("c", 1, b"z", num_samples=5), b"z")
    ledger.add_version(1, b"one")
    ledger.report(report("e", 1, loss=1.0, accuracy=0.5, num_samples=1))
    ledger.report(report("f", 1, loss=3.0, accuracy=1.0, num_samples=3))
    ledger.spend(1, Cost(bytes_down=5, bytes_up=7, seconds=1.5))
    ledger.spend(1, Cost(bytes_down=1))
    ledger.spend(-1, Cost(bytes_down=100))
    before, row = ledger.rows()
    assert (before.round, before.devices, before.loss) == (0, 0, None)
    assert (row.round, row.devices, row.loss, row.accuracy, row.train_loss) == (1, 3, 2.5, 0.875, 1.0)
    assert (row.bytes_down, row.bytes_up, row.seconds) == (6, 7, 1.5)
    assert ledger.cost() == Cost(bytes_down=106, bytes_up=7, seconds=1.5)


def test_a_second_report_changes_nothing(ledger):
    assert ledger.report(report("e", 0, loss=1.0, accuracy=0.5, num_samples=1))
    assert not ledger.report(report("e", 0, loss=9.0, accuracy=0.9, num_samples=1))
    assert ledger.row(0).loss == 1.0


def test_another_job_is_refused_with_what_differs(ledger):
    ledger.close()
    other = Settings(job="j", artifact="b" * 64, rounds=3, clients=2, min_clients=2)
    with pytest.raises(ConfigError) as caught:
        Ledger(ledger.folder, other)
    assert "rounds: 3, was 2" in str(caught.value)
    assert "artifact: 'bbb" in str(caught.value)


def test_two_aggregators_do_not_share_a_ledger(ledger):
    with pytest.raises(ConfigError, match="another aggregator"):
        Ledger(ledger.folder, SETTINGS)


@pytest.mark.parametrize("content", [b"x" * 8192, b"SQLite format 3\0" + b"\xff" * 8192])
def test_a_damaged_ledger_is_named(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises((StateError, ConfigError), match="ledger"):
        Ledger(tmp_path, SETTINGS)


def test_a_payload_that_changed_on_disk_is_named(ledger):
    ledger.accept(update("a", 1, b"good"), b"good")
    next((ledger.folder / "updates").iterdir()).write_bytes(b"evil")
    with pytest.raises(StateError, match=r"00001-a\.bin: SHA-256"):
        list(ledger.accepted(1))
    (ledger.folder / "versions" / "00000.safetensors").unlink()
    with pytest.raises(StateError, match="cannot be read"):
        ledger.version(0)


_CHILD = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_ledger import SETTINGS, update
from fleetune.broker.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), SETTINGS)
ledger.add_version(0, b"zero")
ledger.ask(1, ("a", "b"))
ledger.accept(update("a", 1, b"kept"), b"kept")
sys.stdout.write("acknowledged\\n")
sys.stdout.flush()
sys.stdin.read()
"""


def test_what_was_acknowledged_survives_a_sigkill(tmp_path):
    here = Path(__file__).parent
    command = [sys.executable, "-c", _CHILD, str(tmp_path), str(here), str(here.parent / "support")]
    with children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"acknowledged\n"
        os.kill(child.pid, signal.SIGKILL)
    with Ledger(tmp_path, SETTINGS) as ledger:
        assert ledger.past().asked == ("a", "b")
        assert [a.payload for a in ledger.accepted(1)] == [b"kept"]
