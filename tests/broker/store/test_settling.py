"""Rounds that are long over are settled: the ledger stays as large as it is, and nothing that later rounds go by is lost."""

import sqlite3
from contextlib import closing
from random import Random

import msgspec
import pytest
from rounds_by_hand import job, report, task, update_of

from fleetune.broker.rounds.quarantine import TERM, WINDOW, Quarantine
from fleetune.broker.store import settling
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.marks import MARK_ROUNDS
from fleetune.broker.store.rows import find_row, rows
from fleetune.broker.store.settling import AT_ONCE, MOST_AT_ONCE, stride
from fleetune.broker.store.store import BEFORE, ByKind, Carried, Cost
from fleetune.broker.tasks import FAR, PARDONED, REFUSED, Mark, mark
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import StateError

SETTINGS = job(rounds=10_000)
KEEP = 4


def begun(folder, settings=SETTINGS):
    folder.mkdir(exist_ok=True)
    ledger = Ledger(folder, settings)
    ledger.add_version(0, b"zero", round_number=0)
    ledger.report(report("e", 0))
    return ledger


def close_round(ledger, number, *, keep=KEEP):
    """One round with an update, a decline, a report, costs and marks; of device c only every tenth."""
    names = ["a", "b", *(["c"] if number % 10 == 1 else [])]
    tasks = [task(name, number, place) for place, name in enumerate(names)]
    ledger.enrol(tasks)
    for one in tasks:
        if one.device_id == "b" and number % 3 == 0:
            ledger.decline(one.task_id, "rules", "no")
        else:
            payload = f"{one.task_id}".encode()
            ledger.accept(update_of(one, payload, loss=1 / number), payload)
    noted = [Mark(number, "a", FAR), Mark(number, "b", REFUSED)]
    ledger.add_version(number, b"v%d" % number, round_number=number, marks=noted)
    ledger.report(report("e", number, loss=1 / number))
    carried = {"a": Carried(up=ByKind(values=number)), "": Carried(down=ByKind(protocol=1))}
    ledger.spend(number, Cost(bytes_up=number, seconds=1.0), carried)
    ledger.forget_before(number)
    if keep:
        ledger.settle(number - keep + 1, most=keep)


def close_rounds(ledger, first, last, **options):
    for number in range(first, last + 1):
        close_round(ledger, number, **options)


def sizes(ledger):
    """Rows of each table, and pages of the file."""
    sql = ledger._sql
    names = [name for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    counts = {name: sql.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in names}
    return counts | {"pages": sql.execute("PRAGMA page_count").fetchone()[0]}


def test_a_ledger_stays_as_large_as_it_is(tmp_path):
    """After R and 3R rounds, both as far from the next time that some are settled."""
    few = 2 * MARK_ROUNDS
    with begun(tmp_path) as ledger:
        close_rounds(ledger, 1, few)
        early = sizes(ledger)
        close_rounds(ledger, few + 1, 3 * few)
        late = sizes(ledger)
    assert early["tasks"] < 3 * (KEEP + AT_ONCE)
    assert early["marks"] <= 2 * (MARK_ROUNDS + AT_ONCE)
    for name, count in early.items():
        assert late[name] <= count * 1.02 + 2, (name, early, late)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two ledgers of the same 61 rounds, and an open one: one that settles, one that keeps all."""
    folder = tmp_path_factory.mktemp("pair")
    settled, whole = begun(folder / "settled"), begun(folder / "whole")
    for ledger, keep in ((settled, KEEP), (whole, 0)):
        close_rounds(ledger, 1, 61, keep=keep)
        ledger.enrol([task("a", 62), task("b", 62, 1)])
        ledger.accept(update_of(task("a", 62), b"open"), b"open")
    yield settled, whole
    settled.close(), whole.close()


def test_what_later_rounds_go_by_is_not_lost(pair):
    settled, whole = pair
    assert settled.settled == 48
    assert sizes(settled)["tasks"] < sizes(whole)["tasks"] / 3
    assert settled.turns() == whole.turns() == {"a": 62, "b": 42, "c": 7}
    assert settled.turns(60) == whole.turns(60)
    for device in ("a", "b", "c", "nobody"):
        assert settled.last_update(device) == whole.last_update(device), device
    assert settled.cost() == whole.cost()
    assert settled.carried() == whole.carried()
    assert settled.carried(BEFORE)["a"].up.values == sum(range(1, 49))
    now, then = settled.past(), whole.past()
    assert (now.tasks, now.version, now.closed, now.declined) == (
        then.tasks,
        then.version,
        then.closed,
        then.declined,
    )
    assert now.accepted.items() <= then.accepted.items()
    assert [a.payload for a in settled.accepted()] == [b"open"]


def test_the_last_update_of_a_device_that_was_long_away_is_known(pair):
    settled, _ = pair
    with closing(sqlite3.connect(f"file:{settled.folder / LEDGER}?mode=ro", uri=True)) as sql:
        assert sql.execute("SELECT count(*) FROM tasks WHERE device = 'c' AND round < 51").fetchone() == (0,)
        digests = dict(sql.execute("SELECT device, digest FROM settled_devices"))
    assert digests["c"] == update_of(task("c", 41), b"train-41-c").payload.sha256


def test_a_settled_round_has_the_row_that_it_had(pair):
    settled, whole = pair
    told = rows(settled, spending=float)
    assert [row.round for row in told] == [0, 16, 32, 48, *range(49, 62)]
    all_of_them = {row.round: row for row in rows(whole, spending=float)}
    assert told == [all_of_them[row.round] for row in told]
    assert (told[1].held, told[1].train_loss, told[1].epsilon) == (1, 1 / 16, 16.0)
    assert find_row(settled, 17) is None


def test_a_ledger_that_has_settled_is_opened_again(pair, tmp_path):
    settled, _ = pair
    copy = tmp_path / LEDGER
    with closing(sqlite3.connect(copy)) as target:
        settled._sql.backup(target)
    with Ledger(tmp_path, SETTINGS) as again:
        assert (again.settled, again.newest, again.turns()) == (48, 61, settled.turns())
        assert again.past().tasks == settled.past().tasks


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE lines SET line = '{}' WHERE version = 32", "damaged"),
        ("UPDATE lines SET turns = -1 WHERE version = 32", "damaged"),
        ("DELETE FROM versions WHERE version = 55", "versions are missing"),
        ("DELETE FROM versions WHERE version > 48", "missing|of no version"),
        ("DELETE FROM lines", "versions are missing"),
        ("UPDATE settled_devices SET turns = 'x'", "damaged"),
        ("DROP TABLE settled_devices", "no such table"),
        ("DROP TABLE lines", "no such table"),
    ],
)
def test_what_is_damaged_of_it_is_told(pair, tmp_path, statement, said):
    with closing(sqlite3.connect(tmp_path / LEDGER)) as target:
        pair[0]._sql.backup(target)
        with target:
            target.execute(statement)
    with pytest.raises(StateError, match=said):
        Ledger(tmp_path, SETTINGS)


def test_a_report_on_a_settled_version_is_not_kept(pair, tmp_path):
    with closing(sqlite3.connect(tmp_path / LEDGER)) as target:
        pair[0]._sql.backup(target)
    with Ledger(tmp_path, SETTINGS) as ledger:
        assert not ledger.report(report("late", 17))
        assert ledger.report(report("late", 50))
    Ledger(tmp_path, SETTINGS).close()


def test_settling_that_is_cut_off_leaves_all_as_it_was(tmp_path, monkeypatch):
    def cut(sql, number):
        if number == 3:
            raise sqlite3.OperationalError("disk I/O error")

    with begun(tmp_path) as ledger:
        close_rounds(ledger, 1, 3 * AT_ONCE, keep=0)
        before = sizes(ledger)
        with monkeypatch.context() as context:
            context.setattr(settling, "forget_marks", cut)
            with pytest.raises(StateError, match="cannot write the ledger"):
                ledger.settle(3 * AT_ONCE, most=KEEP)
    with Ledger(tmp_path, SETTINGS) as ledger:
        assert (sizes(ledger), ledger.settled) == (before, 0)
        ledger.settle(3 * AT_ONCE, most=KEEP)
        assert ledger.settled == 3 * AT_ONCE - 1


def test_a_job_that_chooses_by_what_was_told_keeps_all(tmp_path):
    with begun(tmp_path, job(rounds=99, configurator="auto", num_layers=4)) as ledger:
        close_rounds(ledger, 1, 2 * AT_ONCE + KEEP)
        assert (ledger.settled, len(list(ledger.decided()))) == (0, sizes(ledger)["tasks"])


def test_a_long_ledger_of_an_earlier_release_is_settled_little_by_little(tmp_path):
    with begun(tmp_path) as ledger:
        close_rounds(ledger, 1, MOST_AT_ONCE + 2 * AT_ONCE, keep=0)
        turns = ledger.turns()
    with closing(sqlite3.connect(tmp_path / LEDGER)) as sql, sql:
        for name in ("lines", "settled_devices", "mask_notes", "starts"):
            sql.execute(f"DROP TABLE {name}")
        sql.execute("UPDATE job SET format = 4")
    with Ledger(tmp_path, SETTINGS) as ledger:
        found = []
        for _ in range(4):
            ledger.settle(ledger.newest, most=KEEP)
            found.append(ledger.settled)
        assert found == [MOST_AT_ONCE, *[MOST_AT_ONCE + 2 * AT_ONCE - 1] * 3]
        assert ledger.turns() == turns
        assert (ledger.begin(), ledger.begin(), sizes(ledger)["starts"]) == (1, 2, 1)


def test_a_file_becomes_smaller_when_less_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(settling, "_FREE_PAGES", 4)
    with begun(tmp_path) as ledger:
        close_rounds(ledger, 1, 4 * AT_ONCE, keep=0)
        before = sizes(ledger)["pages"]
        ledger.settle(4 * AT_ONCE, most=KEEP)
        assert sizes(ledger)["pages"] < before / 2


def test_a_version_whose_file_a_device_still_needs_keeps_its_row(tmp_path):
    with begun(tmp_path) as ledger:
        close_rounds(ledger, 1, 3, keep=0)
        digest = ledger._one("SELECT sha256 FROM versions WHERE version = 3")
        for number in range(4, 3 * AT_ONCE):
            close_round(ledger, number, keep=0)
            (tmp_path / "versions" / "00003.safetensors").write_bytes(b"v3")
            ledger._blobs._kept.add(3)
        ledger.settle(2 * AT_ONCE, most=KEEP)
        assert (ledger.version_with(digest), ledger.version(3)) == (3, b"v3")
        ledger.forget_before(3 * AT_ONCE)
        ledger.settle(3 * AT_ONCE, most=KEEP)
        assert ledger._one("SELECT count(*) FROM versions WHERE version = 3") == 0


@pytest.mark.parametrize("most", [1, 4, 7, 1000])
def test_lines_are_at_most_so_many_and_evenly_spaced(most):
    for count in range(1, 4000, 37):
        every = stride(count, most)
        assert count // every <= most
        assert every == 1 or count // (every // 2) > most


def test_marks_that_are_forgotten_tell_nothing_any_more():
    """Devices whose updates are struck at random, none while it is left out, as in a job."""
    for seed in range(60):
        rng, strikes = Random(seed), 1 + seed % 4
        whole, marks = Quarantine(strikes), []
        chance = rng.choice([0.03, 0.1, 0.3, 0.9])
        for number in range(1, 400):
            if not whole.holds("a", number) and rng.random() < chance:
                marks.append(mark(number, "a", rng.choice([FAR, REFUSED])))
                whole.add(marks[-1])
            elif rng.random() < 0.005:
                marks.append(mark(number, "a", PARDONED))
                whole.add(marks[-1])
            kept = Quarantine(strikes, [one for one in marks if one.round > number - MARK_ROUNDS])
            for ahead in range(number, number + WINDOW + TERM):
                assert kept.holds("a", ahead) == whole.holds("a", ahead), (seed, number, ahead)


def test_a_line_is_what_a_row_is(pair):
    line = pair[0].line(16)
    assert line.turns == 16
    assert msgspec.json.decode(line.text)["round"] == 16
    assert pair[0].line(17) is None
