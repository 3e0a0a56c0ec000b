"""A ledger that release 0.1.0 wrote, cut off in its second and last round: taken over in place, and finished.

``tests/data/ledger_format_1`` was written by that release (commit 067caa4) with tests/support/fleet.py: two devices of four
parameters, fedavgm, an evaluating device; device-0's second update is accepted, device-1's is not made yet.
``expected-00002.safetensors`` is what that release made of the same job without the cut.
"""

import logging
import shutil
import sqlite3

import msgspec
import pytest
from fleet import Aggregator, Device, World, first_adapter, settings_of
from paths import DATA
from rounds_by_hand import task, update_of

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import rows
from fleetune.broker.store.store import ByKind, Carried, Cost
from fleetune.broker.tasks import Noted
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.loopback import Loopback

OLD = DATA / "ledger_format_1"
SETTINGS = settings_of(rounds=2, clients=2, min_clients=2, strategy="fedavgm")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "aggregator"
    shutil.copytree(OLD, folder)
    with sqlite3.connect(folder / LEDGER) as sql:
        sql.executescript((OLD / "ledger.sql").read_text())
    sql.close()
    return folder


def test_nothing_of_an_old_ledger_is_lost(folder, caplog):
    with caplog.at_level(logging.WARNING), Ledger(folder, SETTINGS) as ledger:
        past = ledger.past()
        assert (past.version, past.closed, past.finished) == (1, 1, False)
        assert [(t.task_id, t.device_id, t.round, t.version, t.position) for t in past.tasks] == [
            ("train-2-device-0", "device-0", 2, 1, 0),
            ("train-2-device-1", "device-1", 2, 1, 1),
        ]
        assert [t.work.seed for t in past.tasks] == [2**20, 2**20 + 1], "the seeds that 0.1.0 offered"
        assert {t.work.rounds_before for t in past.tasks} == {1}
        assert past.accepted["train-1-device-1"].startswith("f2a82c48")
        assert past.accepted.keys() == {"train-1-device-0", "train-1-device-1", "train-2-device-0"}
        assert past.reported == {(0, "eval"), (1, "eval")}
        (accepted,) = ledger.accepted()
        assert (accepted.task, accepted.num_samples) == (past.tasks[0], 5)
        assert len(ledger.version(0)) == len(ledger.version(1)) == 228
        assert len(ledger.strategy_state(1)) == 272
        assert [row.train_loss for row in rows(ledger)] == [
            None,
            (5 * 1.582160543403317 + 6 * 2.182085837712096) / 11,
        ]
        assert [row.accuracy for row in rows(ledger)] == pytest.approx(
            [0.48230741672530408, 0.48269526056710956], rel=1e-12
        )
        assert ledger.cost() == Cost(
            bytes_down=684, bytes_up=267, bytes_sent=5818, bytes_received=2892, seconds=8.0
        )
        assert len(list(ledger.outcomes())) == 3
    assert caplog.text.count("format 1 brought to 5; an open round goes on with the devices and seeds") == 1


def test_it_is_taken_over_once(folder, caplog):
    Ledger(folder, SETTINGS).close()
    caplog.clear()
    with caplog.at_level(logging.WARNING), Ledger(folder, SETTINGS) as ledger:
        assert len(ledger.past().tasks) == 2
    assert caplog.text == ""


def test_an_old_job_is_finished_to_the_bits_of_the_release_that_began_it(folder):
    server = Loopback()
    changes = {"rounds": 2, "clients": 2, "min_clients": 2, "strategy": "fedavgm"}
    aggregator = Aggregator(server, folder.parent, size=4, **changes).start()
    slow = Device(server, folder.parent, 1, size=4).start()
    World(server, aggregator, [slow]).run(until=lambda: aggregator.service.federation.version == 2)
    assert aggregator.version(2) == (OLD / "expected-00002.safetensors").read_bytes()


@pytest.mark.parametrize("rounds", [1, 5])
def test_an_old_job_takes_other_rounds(folder, rounds):
    changed = msgspec.structs.replace(SETTINGS, rounds=rounds)
    with Ledger(folder, changed) as ledger:
        assert len(ledger.past().tasks) == 2
    with Ledger(folder, changed) as ledger:
        assert ledger.past().accepted
        (text,) = ledger._sql.execute("SELECT settings FROM job").fetchone()
    assert msgspec.json.decode(text, type=Settings) == changed


def test_another_job_is_refused_and_left_as_it_was(folder):
    with pytest.raises(ConfigError, match="clients: 3, was 2"):
        Ledger(folder, msgspec.structs.replace(SETTINGS, clients=3))
    sql = sqlite3.connect(folder / LEDGER)
    assert sql.execute("SELECT format FROM job").fetchone() == (1,)


@pytest.mark.parametrize("when", ["after the files", "in the transaction"])
def test_a_takeover_cut_off_anywhere_is_made_up_for(folder, monkeypatch, when):
    if when == "after the files":
        for old in (folder / "versions").glob("*.memory.*"):
            old.rename(old.with_name(old.name.replace("memory", "state")))
    else:
        from fleetune.broker.store import ledger_schema

        with monkeypatch.context() as patched:
            patched.setattr(ledger_schema, "_FORMAT_1_OVER", (*ledger_schema._FORMAT_1_OVER[:4], "BROKEN"))
            with pytest.raises(Exception, match="damaged"):
                Ledger(folder, SETTINGS)
    with Ledger(folder, SETTINGS) as ledger:
        assert len(ledger.past().tasks) == 2
        assert len(ledger.strategy_state(1)) == 272


def test_a_ledger_of_format_2_is_brought_to_this_one(tmp_path):
    folder = tmp_path / "aggregator"
    folder.mkdir()
    server = Loopback()
    aggregator = Aggregator(server, tmp_path, size=4, **CHANGES_2).start()
    devices = [Device(server, tmp_path, n, size=4).start() for n in (0, 1)]
    World(server, aggregator, devices).run(until=lambda: aggregator.service.federation.version == 1)
    aggregator.kill()
    _as_format_2(folder / LEDGER)
    with Ledger(folder, msgspec.structs.replace(aggregator.settings, num_layers=12)) as ledger:
        past = ledger.past()
        assert {task.reason for task in past.tasks} == {""}
        assert past.declined == {}
        assert [decided.num_outcomes for decided in ledger.decided()] == [-1] * 4
        ledger.decline(past.tasks[0].task_id, "memory", "no")
        assert ledger.past().declined == {past.tasks[0].task_id: ("memory", "no")}
        assert [outcome.declined for outcome in ledger.outcomes()] == [None, None, "memory"]
        assert rows(ledger)[1].arms == {"full": 2}


def test_a_ledger_of_format_2_without_a_round_takes_any_settings(tmp_path):
    settings = settings_of(**CHANGES_2)
    Ledger(tmp_path, settings).close()
    _as_format_2(tmp_path / LEDGER)
    with Ledger(tmp_path, msgspec.structs.replace(settings, clients=1, min_clients=1)) as ledger:
        assert ledger._sql.execute("SELECT format FROM job").fetchone() == (5,)


CHANGES_2 = {"rounds": 2, "clients": 2, "min_clients": 2}


def _as_format_2(path):
    """Take out of a ledger what formats 3 and 4 added."""
    _as_format_3(path)
    sql = sqlite3.connect(path)
    with sql:
        sql.execute("ALTER TABLE tasks DROP COLUMN reason")
        sql.execute("ALTER TABLE tasks DROP COLUMN outcomes")
        sql.execute("DROP TABLE declines")
        sql.execute("UPDATE job SET format = 2")
    sql.close()


def _as_format_3(path):
    """Take out of a ledger what format 4 added."""
    sql = sqlite3.connect(path)
    with sql:
        sql.execute("ALTER TABLE tasks DROP COLUMN plan")
        sql.execute("ALTER TABLE updates DROP COLUMN noted")
        sql.execute("DROP TABLE carried")
        sql.execute("UPDATE job SET format = 3")
    sql.close()


def test_a_ledger_of_format_3_goes_on_with_nothing_noted_so_far(tmp_path):
    settings, told = settings_of(**CHANGES_2), task("a", 1)
    with Ledger(tmp_path, settings) as ledger:
        ledger.add_version(0, to_bytes(first_adapter()), round_number=0)
        ledger.enrol([told])
        ledger.accept(update_of(told, b"x"), b"x")
    _as_format_3(tmp_path / LEDGER)
    with Ledger(tmp_path, settings) as ledger:
        (outcome,) = ledger.outcomes()
        assert (outcome.noted, outcome.round, ledger.past().tasks[0].plan) == (Noted(), 1, None)
        assert ledger.carried() == {}
        ledger.spend(1, Cost(), {"a": Carried(up=ByKind(values=3))})
        assert ledger.carried() == {"a": Carried(up=ByKind(values=3))}
