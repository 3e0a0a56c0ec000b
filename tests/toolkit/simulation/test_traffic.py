"""Traffic planners in a simulation: links as simulated are links as seen, and every byte is in the records by kind."""

import json
import sqlite3

import msgspec
import pytest
from simulated import devices, outcome, records, run, write_config

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.seen import blank, note
from fleetune.broker.service.choices import replay
from fleetune.broker.store.ledger import Ledger
from fleetune.toolkit.simulation.charts import draw_run

UP, DOWN = 500.0, 800.0
LINK = (f"networks.far.up_bytes_s={UP}", f"networks.far.down_bytes_s={DOWN}")
CAESAR = ("job.traffic=caesar", "work.histogram=true", "clients=2", "rounds=6", *LINK)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("traffic"))


@pytest.fixture(scope="module")
def folder(path):
    run(path, "caesar", *CAESAR)
    return path.parent / "caesar"


def ledger_in(folder):
    sql = sqlite3.connect(folder / "ledger.sqlite")
    (text,) = sql.execute("SELECT settings FROM job").fetchone()
    sql.close()
    settings = msgspec.json.decode(text, type=Settings)
    return Ledger(folder, settings), settings


def test_links_labels_and_paces_are_seen_as_they_are(folder):
    ledger, settings = ledger_in(folder)
    fleet = blank(settings)
    with ledger:
        for outcome_ in ledger.outcomes():
            fleet = note(fleet, outcome_)
        again = list(replay(ledger, settings))
    by_name = {one["device"]: one for one in devices(folder)}
    for name, seen in fleet.devices.items():
        assert UP / 2 < seen.up <= UP, "latency and messages are in it"
        assert not seen.down or DOWN / 2 < seen.down <= DOWN
        assert sum(seen.histogram) == seen.num_samples == by_name[name]["samples"]
        assert sum(1 for count in seen.histogram if count) == by_name[name]["classes"]
        slow = 3.0 if by_name[name]["profile"] == "slow" else 1.0
        assert seen.sample_s * 8 == pytest.approx(0.5 * slow, rel=0.1)
    assert any(seen.down for seen in fleet.devices.values())
    assert all(task == chosen for task, chosen in again)
    assert len({task.work.batch_size for task, _ in again}) > 1, "slow devices take smaller batches"


def test_every_byte_is_in_the_records_by_kind(folder):
    lines, report = records(folder), json.loads((folder / "run.json").read_text())["report"]
    for way in ("up", "down"):
        for kind in ("values", "positions", "scales", "protocol"):
            assert report[way].get(kind, 0) == sum(line[way].get(kind, 0) for line in lines)
        assert lines[-1][way]["values"] > 0
        whole = sum(lines[-1][way].values())
        assert whole > lines[-1][f"bytes_{way}"]
    assert lines[-1]["up"]["positions"] > 0
    for one in devices(folder):
        assert sum(one["up"].values()) <= one["bytes_up"]


def test_it_is_the_same_again_and_fewer_bytes_than_without(path, folder):
    run(path, "again", *CAESAR)
    assert outcome(path.parent / "again") == outcome(folder)
    run(path, "whole", *CAESAR[2:])
    fewer = [sum(line[f"bytes_{way}"] for line in records(folder)) for way in ("up", "down")]
    whole = [sum(line[f"bytes_{way}"] for line in records(path.parent / "whole")) for way in ("up", "down")]
    assert fewer[0] < 0.6 * whole[0], "halves of 0.4 to 0.9 of the elements, and where they are"
    assert fewer[1] < 0.9 * whole[1]


def test_the_chart_shows_all_rounds(folder, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = {path.name: path for path in draw_run(folder, tmp_path)}
    assert "positions" in drawn["bytes.svg"].read_text()
