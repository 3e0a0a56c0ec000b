"""Bounds on one update of a round, and means that a minority cannot move."""

from itertools import permutations

import numpy as np
import pytest
from fleet import settings_of

from fleetune.broker.methods import robust
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.bounds import FAR, Measured, bounds, held, length_of, norm_of
from fleetune.broker.methods.class_mean import class_mean
from fleetune.broker.methods.robust import num_wrong
from fleetune.broker.methods.strategies import OF_ALL, STRATEGIES
from fleetune.broker.methods.strategy import Bound, Gathered, Update
from fleetune.broker.service.measures import Measures
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead
from fleetune.device_runtime.errors import WireError

REFERENCE = {"a": np.zeros(3, np.float32), "b": np.ones((2, 2), np.float32)}


def update(device, a, b=None, *, weight=1, **more):
    values = {"a": np.asarray(a, np.float64)} | ({} if b is None else {"b": np.asarray(b, np.float64)})
    return Update(values, REFERENCE, weight, device_id=device, **more)


def chosen(name, updates, outliers=0.2):
    strategy = STRATEGIES[name]()
    sums = strategy.init(REFERENCE)
    for one in updates:
        sums = strategy.add(sums, one)
    return strategy.choose(Gathered((), lambda: iter(updates), REFERENCE, 1, outliers))


def drawn(num, seed=3):
    rng = np.random.default_rng(seed)
    return [
        update(f"d{i}", rng.normal(1, 0.1, 3), rng.normal(2, 0.1, (2, 2)), weight=i + 1) for i in range(num)
    ]


def measured(**told):
    return {device: Measured(*one) for device, one in told.items()}


def test_what_is_within_the_bounds_is_not_held():
    assert bounds(measured(a=(10, 1.0), b=(30, 3.0), c=(11, 1.1)), weight_cap=3, length_cap=3) == {}


def test_a_weight_is_cut_and_a_length_is_scaled_to_the_bound():
    found = bounds(measured(a=(30, 1.0), b=(40, 2.0), c=(2**29, 8.0)), weight_cap=3, length_cap=3)
    assert found == {"c": Bound(weight=120, scale=0.75, times=4.0)}


def test_an_update_that_is_far_off_is_left_out():
    found = bounds(measured(a=(1, 1.0), b=(1, 1.0), c=(1, FAR * 1.01)), weight_cap=3, length_cap=3)
    assert found["c"].scale == 0.0


@pytest.mark.parametrize("liars", [1, 2, 3])
def test_fewer_than_half_cannot_raise_a_bound_above_what_honest_devices_have(liars):
    honest = {f"h{i}": Measured(10 + i, 1.0 + i / 10) for i in range(liars + 1)}
    lies = {f"l{i}": Measured(2**29, 1e6) for i in range(liars)}
    found = bounds(honest | lies, weight_cap=3, length_cap=3)
    assert all(found[device].weight <= 3 * (10 + liars) for device in lies)
    assert all(found[device].scale == 0 for device in lies)
    assert not found.keys() & honest


def test_a_round_of_two_and_a_middle_of_zero_bound_nothing():
    assert bounds(measured(a=(1, 1.0), b=(2**29, 1e9)), weight_cap=3, length_cap=3) == {}
    assert bounds(measured(a=(1, 0.0), b=(1, 0.0), c=(1, 5.0)), weight_cap=3, length_cap=3) == {}


def test_bounds_of_zero_are_none():
    assert bounds(measured(a=(1, 1.0), b=(1, 1.0), c=(2**29, 1e9)), weight_cap=0, length_cap=0) == {}


def test_a_held_update_moves_as_far_as_its_scale_says():
    one = update("a", [3.0, 4.0, 0.0], np.ones((2, 2)), weight=100)
    assert length_of(one) == 5.0
    cut = held(one, Bound(weight=7, scale=0.2, times=5.0))
    assert (cut.weight, length_of(cut)) == (7, pytest.approx(1.0))
    assert cut.values["b"].tolist() == REFERENCE["b"].tolist()


def test_a_weight_alone_leaves_the_values_as_they_are():
    one = update("a", [0.1, 0.2, 0.3])
    assert held(one, Bound(weight=1, scale=1.0, times=1.0)).values is one.values


def test_the_length_of_a_part_is_taken_from_that_part():
    names = ("x.lora_A.weight", "x.lora_B.weight")
    reference = {
        names[0]: np.arange(12, dtype=np.float32).reshape(4, 3),
        names[1]: np.ones((2, 4), np.float32),
    }
    rows = np.array([1, 3])
    part = {names[0]: reference[names[0]][rows] + 1.0, names[1]: reference[names[1]][:, rows] + 1.0}
    drawn_part = Update(part, reference, 1, rows=dict.fromkeys(names, rows))
    first = Update({names[0]: reference[names[0]][:2] + 1.0}, reference, 1)
    assert length_of(drawn_part) == pytest.approx(np.sqrt(10))
    assert length_of(first) == pytest.approx(np.sqrt(6))


def test_class_sums_are_held_by_samples_and_by_their_length():
    head = ClassHead("b")
    strategy = class_mean(head)
    sums = {
        SUMS: np.array([[4.0, 0.0], [0.0, 8.0]]),
        COUNTS: np.array([1.0, 2.0]),
        SQUARES: np.array([16.0, 32.0]),
    }
    one = Update(sums, {}, 3, device_id="a")
    assert strategy.length(one) == 4.0
    cut = strategy.hold(one, Bound(weight=1, scale=0.5, times=9.0))
    assert strategy.length(cut) == pytest.approx(2.0)
    assert cut.values[COUNTS].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert (cut.values[SUMS] / cut.values[COUNTS][:, None]).tolist() == [[2.0, 0.0], [0.0, 2.0]]
    strategy.add(strategy.init({"b": np.zeros((2, 2), np.float32)}), cut)


@pytest.mark.parametrize("name", OF_ALL)
def test_order_changes_no_bit(name):
    made = [chosen(name, order) for order in permutations(drawn(5))]
    assert {tuple(one[n].tobytes() for n in one) for one in made} == {
        tuple(made[0][n].tobytes() for n in made[0])
    }


@pytest.mark.parametrize("name", OF_ALL)
@pytest.mark.parametrize("block_bytes", [8, 64, 2**20])
def test_blocks_change_no_bit(name, block_bytes, monkeypatch):
    whole = chosen(name, drawn(5))
    monkeypatch.setattr(robust, "BLOCK_BYTES", block_bytes)
    again = chosen(name, drawn(5))
    assert all(again[n].tobytes() == whole[n].tobytes() for n in whole)


@pytest.mark.parametrize("name", OF_ALL)
@pytest.mark.parametrize(("num", "wrong"), [(3, 1), (5, 2), (9, 3)])
@pytest.mark.parametrize("lie", [-1e6, 0.0, 1e6])
def test_a_minority_moves_the_result_no_further_than_honest_extremes(name, num, wrong, lie):
    if num < 2 * wrong + 3 and "krum" in name:
        return  # its guarantee needs as many
    honest = drawn(num - wrong)
    lies = [update(f"l{i}", [lie] * 3, np.full((2, 2), lie), weight=2**29) for i in range(wrong)]
    found = chosen(name, [*lies, *honest], outliers=min(0.45, wrong / num))
    for tensor in REFERENCE:
        values = np.stack([one.values[tensor] for one in honest])
        assert np.all(found[tensor] >= values.min(0).astype(np.float32)), tensor
        assert np.all(found[tensor] <= values.max(0).astype(np.float32)), tensor


def test_the_mean_is_moved_by_the_same_minority():
    strategy, sums = fedavg(), fedavg().init(REFERENCE)
    for one in [*drawn(4), update("l", [1e6] * 3, weight=2**29)]:
        sums = strategy.add(sums, one)
    assert strategy.finish(sums, REFERENCE, {})[0]["a"].min() > 1e5


def test_by_hand():
    updates = [update(f"d{i}", [v, v, v]) for i, v in enumerate([1.0, 2.0, 3.0, 4.0, 100.0])]
    assert chosen("median", updates)["a"].tolist() == [3.0] * 3
    assert chosen("median", updates[:4])["a"].tolist() == [2.5] * 3
    assert chosen("trimmed", updates)["a"].tolist() == [3.0] * 3
    assert chosen("krum", updates)["a"].tolist() == [2.0] * 3, "the first of two that are as near"
    assert chosen("multi-krum", updates)["a"].tolist() == [2.5] * 3


@pytest.mark.parametrize("name", OF_ALL)
def test_a_tensor_counts_over_the_updates_that_hold_it(name):
    updates = [
        update("d0", [1, 1, 1], np.full((2, 2), 1.5)),
        update("d1", [1, 1, 1]),
        update("d2", [1, 1, 1]),
    ]
    found = chosen(name, updates[1:])
    assert found["b"].tolist() == REFERENCE["b"].tolist()
    assert found["a"].tolist() == [1, 1, 1]
    if name in ("median", "trimmed"):
        assert chosen(name, updates)["b"].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    if name == "krum":
        assert chosen(name, updates)["b"].tolist() == REFERENCE["b"].tolist(), "what is absent has not moved"


@pytest.mark.parametrize("name", OF_ALL)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**21])
def test_what_is_no_number_is_refused(name, value):
    with pytest.raises(WireError, match="a value that is not finite or beyond"):
        chosen(name, [update("d", [value, 0, 0])])


def test_as_many_are_wrong_as_can_be():
    assert [num_wrong(0.2, n) for n in (0, 1, 2, 3, 5, 10)] == [0, 0, 0, 1, 1, 2]
    assert [num_wrong(0.49, n) for n in (2, 4, 5)] == [0, 1, 2]


def test_class_sums_of_longer_features_than_a_model_makes_are_left_out():
    measures = Measures(settings_of())
    strategy = class_mean(ClassHead("b"))
    for device, length in (("a", 1.0), ("b", 1.1), ("b2", 1.1), ("c", 2.3), ("d", 0.0)):
        sums = {SUMS: np.zeros((1, 2)), COUNTS: np.ones(1), SQUARES: np.array([length**2])}
        measures.add(Update(sums, {}, 5, device_id=device), strategy)
    found = measures.bounds(strategy, {}, lambda: iter(()), tuple)
    assert {device: bound.scale for device, bound in found.items()} == {"c": 0.0, "d": 0.0}


def test_who_still_learns_is_not_far_off_among_those_that_do_not():
    still = measured(a=(1, 0.0), b=(1, 1e-9), c=(1, 0.04))
    assert bounds(still, weight_cap=3, length_cap=5)["c"].scale == 0.0
    assert bounds(still, weight_cap=3, length_cap=5, floor=0.01) == {}
    assert bounds(still, weight_cap=3, length_cap=3, floor=0.01)["c"].scale == pytest.approx(0.75)
    assert norm_of({"w": np.full((2, 2), 3.0, np.float32), "b": np.array(8.0)}) == 10.0
