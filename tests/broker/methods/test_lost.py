"""What stands in for updates that did not come: averages by hand, what is kept of whom, and a restart in the middle."""

import logging

import numpy as np
import pytest
from fleet import settings_of

from fleetune.broker.methods.averaging import fedavg, fedavgm
from fleetune.broker.methods.lost import SKETCH, cosine, own_last, safari, sketch, standing_in
from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.broker.methods.strategy import VALUE_MAX, Gathered, Update
from fleetune.broker.service.versions import Versions
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.tasks import Task
from fleetune.device_runtime.arrays import parse_arrays, to_bytes
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Key, integers

SIZE = 400
ZERO = {"w": np.zeros(SIZE, np.float32), "head": np.zeros(2, np.float32)}
STANDING_IN = [name for name in STRATEGIES if STRATEGIES[name]().stand_in]


def ones(at, value=1.0):
    """A difference of ``value`` in the ``at``-th quarter of w."""
    moved = np.zeros(SIZE)
    moved[100 * at : 100 * (at + 1)] = value
    return moved


def update(device, w, weight, reference=ZERO):
    values = {"w": reference["w"].astype(np.float64) + w}
    return Update(values, reference, weight, device_id=device)


def closed(strategy, updates, *, lost=(), state=None, reference=ZERO, version=1):
    sums = strategy.init(reference)
    for one in updates:
        sums = strategy.add(sums, one)
    gathered = Gathered(tuple(lost), lambda: iter(updates), reference, version)
    found = strategy.stand_in(gathered, state or {})
    for one in found.updates:
        sums = strategy.add(sums, one)
    return strategy.finish(sums, reference, found.state)


def first_round(strategy):
    """b moves as a does, c against them; a 10 samples, b 20, c 30."""
    return closed(
        strategy, [update("a", ones(0), 10), update("b", ones(0, 2.0), 20), update("c", ones(0, -1.0), 30)]
    )


def test_safari_takes_the_update_most_like_the_lost_one_with_the_lost_one_s_weight_by_hand():
    """a is lost; of b and c it is b that moved as a did before: (10 + 20) x 6 and 30 x -3 over 60."""
    _, state = first_round(safari())
    sent = [update("b", ones(0, 6.0), 20), update("c", ones(0, -3.0), 30)]
    made, _ = closed(safari(), sent, lost=["a"], state=state, version=2)
    assert set(made["w"][:100]) == {1.5}
    assert not made["w"][100:].any()
    dropped, _ = closed(standing_in(fedavg(), EMPTY), sent, lost=["a"], state=state, version=2)
    assert set(dropped["w"][:100]) == {np.float32((20 * 6 - 30 * 3) / 50)}, "today's"


def test_own_last_lays_its_last_difference_over_the_newest_version_by_hand():
    """a moved by 1 with 10 samples: (10 (5 + 1) + 20 (5 + 6)) / 30 where b moves by 6 from 5."""
    _, state = first_round(own_last())
    newest = {"w": np.full(SIZE, 5.0, np.float32), "head": ZERO["head"]}
    made, kept = closed(
        own_last(),
        [update("b", ones(0, 6.0), 20, newest)],
        lost=["a"],
        state=state,
        reference=newest,
        version=2,
    )
    assert set(made["w"][:100]) == {np.float32((10 * 6 + 20 * 11) / 30)}
    assert kept["a w"].tolist() == state["a w"].tolist(), "what stands in is not what the device sent"


def test_two_lost_devices_may_have_one_stand_in_and_count_both():
    """a and b moved as d did, which came: d counts (1 + 2 + 4) of 15, e its own 8."""
    sent = [update(d, ones(i), n) for d, i, n in (("a", 0, 1), ("b", 0, 2), ("d", 0, 4), ("e", 1, 8))]
    _, state = closed(safari(), sent)
    made, _ = closed(
        safari(),
        [update("d", ones(0), 4), update("e", ones(1), 8)],
        lost=["a", "b"],
        state=state,
        version=2,
    )
    assert made["w"][0] == np.float32((1 + 2 + 4) / 15)
    assert made["w"][100] == np.float32(8 / 15)


@pytest.mark.parametrize("name", STANDING_IN)
def test_a_device_of_which_nothing_is_known_is_left_out(name):
    made, state = closed(STRATEGIES[name](), [update("b", ones(1, 3.0), 5)], lost=["stranger"])
    assert set(made["w"][100:200]) == {3.0}
    assert {key.split(" ")[0] for key in state} == {"b"}


@pytest.mark.parametrize("name", STANDING_IN)
def test_without_a_loss_it_is_fedavg_to_the_bit(name):
    rng = np.random.default_rng(0)
    updates = [update(d, rng.standard_normal(SIZE), n) for d, n in zip("abc", (3, 50, 7), strict=True)]
    made, _ = closed(STRATEGIES[name](), updates)
    sums = fedavg().init(ZERO)
    for one in updates:
        sums = fedavg().add(sums, one)
    wanted, _ = fedavg().finish(sums, ZERO, {})
    assert {n: v.tobytes() for n, v in made.items()} == {n: v.tobytes() for n, v in wanted.items()}


@pytest.mark.parametrize("name", STANDING_IN)
def test_law_the_order_of_arrival_changes_neither_version_nor_state(name):
    strategy = STRATEGIES[name]()
    _, state = first_round(strategy)
    sent = [update("b", ones(0, 6.0), 20), update("c", ones(0, -3.0), 30), update("d", ones(2), 9)]
    found = [
        closed(STRATEGIES[name](), order, lost=["a"], state=state, version=2) for order in (sent, sent[::-1])
    ]
    assert to_bytes(found[0][0]) == to_bytes(found[1][0])
    assert to_bytes(found[0][1]) == to_bytes(found[1][1])


@pytest.mark.parametrize(("make", "size"), [(safari, SKETCH * 4), (own_last, SIZE * 4)])
def test_what_is_kept_is_of_the_devices_heard_last_and_of_its_size(make, size):
    strategy, state = make(known_max=3), {}
    for version, devices in ((1, "abc"), (2, "cd"), (3, "b")):
        _, state = closed(strategy, [update(d, ones(0), 1) for d in devices], state=state, version=version)
    assert {key.split(" ")[0] for key in state} == {"b", "c", "d"}
    assert {value.nbytes for key, value in state.items() if not key.endswith(" heard")} == {size}
    assert state["b heard"].tolist() == [1, 3]


def test_a_strategy_keeps_its_own_state_beside_what_is_known_of_devices():
    _, state = closed(standing_in(fedavgm(momentum=0.5), EMPTY), [update("a", ones(0, 2.0), 1)])
    assert set(state["w"][:100]) == {2.0}
    made, state = closed(
        standing_in(fedavgm(momentum=0.5), EMPTY), [update("a", ones(0, 2.0), 1)], state=state, version=2
    )
    assert set(made["w"][:100]) == {3.0}
    assert "a heard" in state


def test_a_sketch_adds_each_element_to_its_place_by_its_sign():
    moved = np.arange(1.0, SIZE + 1)
    drawn = integers(Key(0, "sketch", 0x1C630B12), SIZE).tolist()
    wanted = np.zeros(SKETCH)
    for value, n in zip(moved, drawn, strict=True):
        wanted[n % 256] += -value if n // 256 % 2 else value
    assert sketch(update("a", moved, 1)).tolist() == wanted.tolist()


def test_cosines_of_sketches_are_about_those_of_the_updates():
    rng = np.random.default_rng(1)
    big = {"w": np.zeros(20_000, np.float32)}
    one, other = rng.standard_normal((2, 20_000))
    for share in (0.0, 0.5, 1.0, -1.0):
        mixed = share * one + np.sqrt(1 - share**2) * other
        sketches = [sketch(update("a", w, 1, big)) for w in (one, mixed)]
        assert cosine(*sketches) == pytest.approx(share, abs=4 / 16)
    assert cosine(sketch(update("a", 0 * one, 1, big)), sketches[0]) == 0.0


def test_of_equally_alike_updates_the_first_by_name_stands_in():
    _, state = closed(safari(), [update("a", ones(0), 1)])
    sent = [update("z", ones(1), 1), update("b", ones(1), 1)]
    found = safari().stand_in(Gathered(("a",), lambda: iter(sent), ZERO, 2), state)
    assert [one.device_id for one in found.updates] == ["b"]


class Desk:
    """A job's versions in a folder, and rounds by hand."""

    def __init__(self, folder, strategy):
        self.folder, self.settings = folder, settings_of(strategy=strategy, work=LocalWork())
        self.open()

    def open(self):
        self.ledger = Ledger(self.folder, self.settings)
        self.versions = Versions(self.ledger, self.settings, ZERO)

    def reopen(self):
        self.ledger.close()
        self.open()

    def send(self, number, device, w, weight):
        reference = self.versions.reference(number - 1)
        task = Task(f"train-{number}-{device}", device, "train", number, number - 1, ord(device), LocalWork())
        self.ledger.enrol([task])
        values = {"w": (reference["w"] + w).astype(np.float32)}
        content = encode_update("fp32", values, reference)
        sent = UpdateReady(
            device_id=device, job="home", task_id=task.task_id, round=number, version=number - 1, codec="fp32",
            num_samples=weight, payload=Outgoing(content).manifest,
        )  # fmt: skip
        self.versions.add(task, content, weight)
        self.ledger.accept(sent, content)

    def run(self, *, restarts):
        again = self.reopen if restarts else lambda: None
        for device, value, weight in (("a", 1.0, 10), ("b", 2.0, 20), ("c", -1.0, 30)):
            self.send(1, device, ones(0, value), weight)
        self.versions.close(1, 1)
        again()
        self.send(2, "b", ones(0, 6.0), 20)
        again()
        self.send(2, "c", ones(1, -3.0), 30)
        again()
        self.versions.close(2, 2, lost=("a",))
        again()
        self.send(3, "c", ones(2), 30)
        self.versions.close(3, 3, lost=("a", "b"))
        made, state = self.ledger.version(3), self.ledger.strategy_state(3)
        self.ledger.close()
        return made, state


@pytest.mark.parametrize("name", STANDING_IN)
def test_a_job_that_is_stopped_anywhere_makes_the_same_versions_and_state(name, tmp_path, caplog):
    straight = Desk(tmp_path / "straight", name)
    with caplog.at_level(logging.INFO):
        made = straight.run(restarts=False)
    assert "round 2: 1 updates stand in for lost ones" in caplog.text
    assert "round 3: 2 updates stand in for lost ones" in caplog.text
    assert Desk(tmp_path / "stopped", name).run(restarts=True) == made
    assert Desk(tmp_path / "dropping", "fedavg").run(restarts=True)[0] != made[0]
    assert {key.split(" ")[0] for key in parse_arrays(made[1])} == {"a", "b", "c"}


def test_a_stand_in_that_is_beyond_belief_is_left_out(tmp_path, caplog):
    """Its difference laid over a version that has moved since; the round closes without it."""
    desk = Desk(tmp_path / "job", "own-last")
    for number in (1, 2):
        desk.send(number, "a", ones(0, 0.4 * VALUE_MAX), 1)
        desk.versions.close(number, number)
    desk.send(3, "b", ones(1), 1)
    desk.versions.close(3, 3, lost=("a",))
    assert "nothing stands in for a lost update: implausible update: w: a value" in caplog.text
    assert parse_arrays(desk.ledger.version(3))["w"][100] == 1.0
    desk.ledger.close()


EMPTY = type("Rule", (), {"remember": staticmethod(lambda u: {}), "known_max": 9})()
EMPTY.choose = lambda gathered, known, arrived: iter(())
