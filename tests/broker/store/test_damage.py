"""Ledgers that were damaged or edited: whoever starts on one is told in one line, or goes on; nothing else comes out."""

import shutil
import sqlite3

import numpy as np
import pytest
from fleet import Aggregator, Device, World, settings_of

from fleetune.broker.store.damage import damaged
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import rows
from fleetune.broker.store.store import ByKind, Carried, Cost
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import FleetuneError, StateError
from fleetune.device_runtime.network.loopback import Loopback

TRIES = 400
CHANGES = {"rounds": 3, "clients": 2, "min_clients": 2, "strategy": "fedavgm", "size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A job of three rounds, killed in its third with one update of two."""
    folder = tmp_path_factory.mktemp("whole")
    server = Loopback()
    aggregator = Aggregator(server, folder, **CHANGES).start()
    devices = [Device(server, folder, n, size=4).start() for n in (0, 1)]
    judge = Device(server, folder, 9, name="eval", role="evaluate", size=4).start()
    playing = World(server, aggregator, [*devices, judge])
    playing.run(until=lambda: aggregator.service.federation.version == 2)
    devices[1].kill()
    playing.run(until=lambda: len(list(aggregator.ledger.accepted())) == 1)
    aggregator.ledger.decline("train-2-device-1", "memory", "no")
    aggregator.ledger.spend(3, Cost(), {"device-0": Carried(up=ByKind(values=3))})
    aggregator.kill()
    sql = sqlite3.connect(aggregator.folder / LEDGER)
    sql.execute("PRAGMA journal_mode = DELETE")
    sql.close()
    return aggregator.folder


def start(folder):
    """Start on a ledger, look at all of it, and let a device go on with it for a while."""
    server = Loopback()
    aggregator = Aggregator(server, folder.parent, **CHANGES)
    aggregator.folder = folder
    try:
        aggregator.start()
        rows(aggregator.ledger)
        list(aggregator.ledger.decided())
        aggregator.service.snapshot()
        devices = [Device(server, None, n, size=4).start() for n in (0, 1)]
        playing = World(server, aggregator, devices)
        for _ in range(30):
            playing.turn()
    finally:
        if getattr(aggregator, "ledger", None):
            aggregator.ledger.close()


def _edited(path, rng):
    """One column of one row becomes something else."""
    values = [
        None,
        -1,
        2**31,
        2**63 - 1,
        7.5,
        float("nan"),
        "x",
        "",
        b"\xff\xfe",
        "\ud7ff",
        '{"loss": 1e999}',
        "[]",
    ]
    sql = sqlite3.connect(path)
    tables = [name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = tables[rng.integers(len(tables))]
    columns = [row[1] for row in sql.execute(f"PRAGMA table_info({table})")]
    column, value = columns[rng.integers(len(columns))], values[rng.integers(len(values))]
    places = [rowid for (rowid,) in sql.execute(f"SELECT rowid FROM {table}")]
    if not places:
        return f"{table}: nothing to edit"
    try:
        with sql:
            if rng.integers(6) == 0:
                sql.execute(f"DELETE FROM {table} WHERE rowid = ?", (places[rng.integers(len(places))],))
            elif rng.integers(6) == 0:
                sql.execute(f"UPDATE {table} SET {column} = CAST(x'ff41' AS TEXT)")
            else:
                at = places[rng.integers(len(places))]
                sql.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (value, at))
    except sqlite3.Error:
        pass  # a law of the schema forbids it
    sql.close()
    return f"{table}.{column} = {value!r}"


def _flipped(path, rng):
    content = bytearray(path.read_bytes())
    places = rng.integers(len(content), size=rng.integers(1, 20))
    for at in places:
        content[at] = rng.integers(256)
    path.write_bytes(bytes(content[: rng.integers(len(content))] if rng.integers(8) == 0 else content))
    return f"bytes {places.tolist()}"


def test_whatever_is_damaged_or_edited_only_our_errors_come_out(folder, tmp_path):
    refused = 0
    for seed in range(TRIES):
        rng = np.random.default_rng(seed)
        copy = shutil.copytree(folder, tmp_path / str(seed))
        what = (_edited if seed % 2 else _flipped)(copy / LEDGER, rng)
        try:
            start(copy)
        except FleetuneError as exc:
            refused += 1
            assert "\n" not in str(exc)  # noqa: PT017 (to go on is as right)
        except Exception as exc:
            raise AssertionError(f"seed {seed}, {what}: {type(exc).__name__}: {exc}") from exc
        shutil.rmtree(copy)
    assert TRIES / 4 < refused < TRIES


def test_what_is_damaged_is_named_with_what_to_do(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with sqlite3.connect(copy / LEDGER) as sql:
        sql.execute("DELETE FROM versions WHERE version = 1")
    sql.close()
    with pytest.raises(
        StateError, match=r"ledger\.sqlite: not a ledger, or damaged: versions are missing; put a copy"
    ):
        start(copy)


def test_a_ledger_that_a_release_before_spoilt_goes_on(folder, tmp_path):
    """0.1.0 took reports of 2^63 - 1 samples; their sum is beyond an int64, the mean is not."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with sqlite3.connect(copy / LEDGER) as sql:
        sql.execute(
            "INSERT INTO evaluations VALUES (1, 'huge', 'evaluate-1-huge', 3.0, 1.0, ?)", (2**63 - 1,)
        )
        sql.execute(
            "INSERT INTO evaluations VALUES (1, 'more', 'evaluate-1-more', 1.0, 0.5, ?)", (2**63 - 1,)
        )
    sql.close()
    server = Loopback()
    aggregator = Aggregator(server, copy.parent, **CHANGES)
    aggregator.folder = copy
    aggregator.start()
    devices = [Device(server, None, n, size=4).start() for n in (0, 1)]
    World(server, aggregator, devices).run(until=lambda: aggregator.service.federation.version == 3)
    found = rows(aggregator.ledger)[1]
    assert found.loss == pytest.approx(2.0)
    assert found.accuracy == pytest.approx(0.75)
    aggregator.ledger.close()


def test_a_whole_ledger_is_not_refused(folder, tmp_path):
    start(shutil.copytree(folder, tmp_path / "copy"))


def test_damage_that_would_be_met_in_the_middle_of_a_job_is_told_at_its_start(folder, tmp_path):
    """An index of nothing but inserts."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with sqlite3.connect(copy / LEDGER) as sql:
        (page,) = sql.execute(
            "SELECT rootpage FROM sqlite_master WHERE tbl_name = 'works' AND type = 'index'"
        ).fetchone()
        (size,) = sql.execute("PRAGMA page_size").fetchone()
    sql.close()
    content = bytearray((copy / LEDGER).read_bytes())
    content[(page - 1) * size : page * size] = bytes(size)
    (copy / LEDGER).write_bytes(bytes(content))
    with pytest.raises(StateError, match="not a ledger, or damaged"):
        Ledger(copy, settings_of(**{name: value for name, value in CHANGES.items() if name != "size"}))


def test_a_full_disk_is_not_called_damage(tmp_path):
    full = sqlite3.OperationalError("database or disk is full")
    assert "ledger: cannot be used: database or disk is full; the same" in str(
        damaged(tmp_path / "ledger", full)
    )
    assert "not a ledger, or damaged" in str(
        damaged(tmp_path, sqlite3.OperationalError("no such table: job"))
    )


_OPEN = "WHERE made IS NULL"


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (f"UPDATE updates SET num_samples = 0 {_OPEN}", "implausible update: 0 samples"),
        (f"UPDATE updates SET num_samples = 1 << 62 {_OPEN}", "Expected `int` <= 2147483647"),
        (f"UPDATE updates SET digest = substr(digest, 2) || '0' {_OPEN}", "damaged, or replaced"),
        (f"UPDATE updates SET task_id = 'another' {_OPEN}", "updates of no task"),
        ("UPDATE versions SET sha256 = substr(sha256, 2) || '0' WHERE version = 2", "damaged, or replaced"),
        ("UPDATE tasks SET version = 1 WHERE round = 3", "another version than the newest"),
        ("UPDATE evaluations SET accuracy = 7", "Expected `float` <= 1.0"),
        ("UPDATE evaluations SET loss = -1e300", "Expected `float` >= -1e\\+39"),
        ("UPDATE costs SET bytes_up = -9", "Expected `int` >= 0"),
        ("UPDATE costs SET seconds = -9", "Expected `float` >= 0"),
        ("UPDATE job SET settings = replace(settings, 'fedavgm', 'fedavg')", "holds another job"),
        ("DELETE FROM versions WHERE version = 2", "updates of no version"),
    ],
)
def test_a_row_that_somebody_wrote_and_that_cannot_be_is_refused(folder, tmp_path, edit, said):
    copy = shutil.copytree(folder, tmp_path / "copy")
    with sqlite3.connect(copy / LEDGER) as sql:
        assert sql.execute(edit).rowcount > 0
    sql.close()
    with pytest.raises(FleetuneError, match=said):
        start(copy)


def test_a_row_that_could_be_is_taken_as_written(folder, tmp_path):
    """Whoever may write an aggregator's folder may write its model: no checksum is secret from them."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with sqlite3.connect(copy / LEDGER) as sql:
        sql.execute(f"UPDATE updates SET num_samples = num_samples + 7 {_OPEN}")
        sql.execute("UPDATE evaluations SET accuracy = 0.99")
    sql.close()
    start(copy)
