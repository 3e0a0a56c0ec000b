"""The laws of a store, on disk and in memory."""

from hashlib import sha256

import msgspec
import pytest
from rounds_by_hand import job, report, task, update_of

from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.rows import row, rows
from fleetune.broker.store.store import AFTERWARDS, Accepted, ByKind, Carried, Cost, Past
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import StateError, WireError

SETTINGS = job()
A, B, C = (task(device, 1, i) for i, device in enumerate("abc"))


class OnDisk:
    def __init__(self, folder):
        self.folder = folder
        self.store = Ledger(folder, SETTINGS)

    def reopened(self):
        self.store.close()
        self.store = Ledger(self.folder, SETTINGS)
        return self.store


class InMemory:
    def __init__(self, _):
        self.store = MemoryStore()

    def reopened(self):
        return self.store


@pytest.fixture(params=[OnDisk, InMemory])
def kept(request, tmp_path):
    kept = request.param(tmp_path)
    kept.store.add_version(0, b"zero", round_number=0)
    return kept


@pytest.fixture
def store(kept):
    return kept.store


def test_a_new_store_has_no_past(store):
    assert store.past() == Past(accepted={})
    assert (store.newest, store.finished, list(store.accepted()), list(store.outcomes())) == (
        0,
        False,
        [],
        [],
    )


def test_everything_survives_reopening(kept):
    kept.store.enrol([B, A])
    kept.store.enrol([C])
    kept.store.accept(update_of(A, b"payload", loss=0.5, odd=float("nan")), b"payload")
    kept.store.report(report("e", 0))
    past = kept.reopened().past()
    assert set(past.tasks) == {A, B, C}
    assert past.accepted == {A.task_id: sha256(b"payload").hexdigest()}
    assert past.reported == {(0, "e")}
    assert list(kept.store.accepted()) == [Accepted(A, 10, b"payload")]
    assert list(kept.store.outcomes()) == [Outcome("a", A.work, {"loss": 0.5}, round=1, num_samples=10)]
    assert kept.store.version(0) == b"zero"
    kept.store.finish()
    assert kept.reopened().past().finished


def test_the_very_work_of_each_task_is_kept(kept):
    other = LocalWork(steps=7, codec="int8", seed=2**40)
    kept.store.enrol([A, B._replace(work=other)])
    assert [t.work for t in kept.reopened().past().tasks] == [A.work, other]


def test_closing_a_round_keeps_versions_and_forgets_payloads(kept):
    kept.store.enrol([A])
    kept.store.accept(update_of(A, b"x"), b"x")
    kept.store.add_version(1, b"one", round_number=1, state=b"momentum")
    assert list(kept.reopened().accepted()) == []
    assert (kept.store.version(0), kept.store.version(1)) == (b"zero", b"one")
    assert (kept.store.strategy_state(1), kept.store.strategy_state(0)) == (b"momentum", b"")
    kept.store.add_version(2, b"two", round_number=2, state=b"speed")
    assert (kept.store.strategy_state(2), kept.store.strategy_state(1)) == (b"speed", b"")
    assert (kept.reopened().strategy_state(2), kept.reopened().strategy_state(1)) == (b"speed", b"")
    past = kept.store.past()
    assert (past.version, past.closed, past.tasks) == (2, 2, ())
    assert past.accepted, "who was accepted is known for ever"
    assert [o.device_id for o in kept.store.outcomes()] == ["a"]


def test_the_digest_of_an_accepted_update_is_told_in_any_later_life(kept):
    kept.store.enrol([A, B])
    assert kept.store.digest_of(A.task_id) is None
    kept.store.accept(update_of(A, b"x"), b"x")
    kept.store.add_version(1, b"one", round_number=1)
    store = kept.reopened()
    assert store.digest_of(A.task_id) == sha256(b"x").hexdigest()
    assert (store.digest_of(B.task_id), store.digest_of("no task")) == (None, None)


def test_versions_and_rounds_are_counted_apart(kept):
    later = task("a", 5, version=0)
    kept.store.enrol([later])
    kept.store.accept(update_of(later, b"x"), b"x")
    kept.store.add_version(1, b"one", round_number=5)
    kept.store.spend(5, Cost(bytes_up=3))
    past = kept.reopened().past()
    assert (past.version, past.closed) == (1, 5)
    found = row(kept.store, 1)
    assert (found.round, found.devices, found.bytes_up) == (5, 1, 3)


def test_a_task_is_counted_once(store):
    store.enrol([A])
    store.accept(update_of(A, b"x"), b"x")
    with pytest.raises(WireError, match="task 'train-1-a' has an update already"):
        store.accept(update_of(A, b"y"), b"y")
    assert [a.payload for a in store.accepted()] == [b"x"]


def test_an_update_of_no_task_is_not_kept(store):
    with pytest.raises(WireError, match=r"task '\.\./\.\./x' was not enrolled"):
        store.accept(update_of(A._replace(task_id="../../x"), b"x"), b"x")
    assert list(store.accepted()) == []


def test_rows_weigh_by_samples(store):
    store.enrol([A, B, C])
    store.accept(update_of(A, b"x", num_samples=1, loss=4.0), b"x")
    store.accept(update_of(B, b"y", num_samples=3, loss=0.0), b"y")
    store.accept(update_of(C, b"z", num_samples=5, loss=float("inf")), b"z")
    store.add_version(1, b"one", round_number=1)
    store.report(report("e", 1, loss=1.0, accuracy=0.5, num_samples=1))
    store.report(report("f", 1, loss=3.0, accuracy=1.0, num_samples=3))
    store.spend(1, Cost(bytes_down=5, bytes_up=7, seconds=1.5))
    store.spend(1, Cost(bytes_down=1))
    store.spend(AFTERWARDS, Cost(bytes_down=100))
    before, after = rows(store)
    assert (before.round, before.devices, before.loss) == (0, 0, None)
    assert (after.round, after.devices, after.loss, after.accuracy, after.train_loss) == (
        1,
        3,
        2.5,
        0.875,
        1.0,
    )
    assert (after.bytes_down, after.bytes_up, after.seconds) == (6, 7, 1.5)
    assert store.cost() == Cost(bytes_down=106, bytes_up=7, seconds=1.5)
    assert store.cost(7) == Cost()


def test_a_second_report_changes_nothing(store):
    assert store.report(report("e", 0, loss=1.0))
    assert not store.report(msgspec.structs.replace(report("e", 0, loss=9.0)))
    assert row(store, 0).loss == 1.0


def test_a_version_is_found_by_its_digest(store):
    store.add_version(1, b"one", round_number=1)
    store.add_version(2, b"one", round_number=2)
    assert store.version_with(sha256(b"one").hexdigest()) == 2
    assert store.version_with(sha256(b"two").hexdigest()) is None


def test_a_version_that_was_never_made_is_an_error(store):
    with pytest.raises(StateError):
        store.version(9)


def test_what_is_counted_adds_up_in_every_field():
    for kind in (Cost, ByKind):
        one, other = (kind(**{name: n + i for i, name in enumerate(kind.__struct_fields__)}) for n in (1, 10))
        assert msgspec.structs.astuple(one + other) == tuple(
            11 + 2 * i for i in range(len(kind.__struct_fields__))
        )
    up, down = ByKind(values=1), ByKind(scales=2)
    assert Carried(up=up) + Carried(down=down) == Carried(up=up, down=down)
