from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from codec_rows import CODEC_ROWS
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from fleetune.broker.methods.averaging import fedavg, fedavgm
from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.broker.methods.strategy import VALUE_MAX, WEIGHT_MAX, Gathered, Update, add_to_sums, init_sums
from fleetune.device_runtime.contracts.codecs import make_codec, pack, unpack
from fleetune.device_runtime.errors import UnknownName, WireError

REFERENCE = {"a": np.array([1.0, -2.0, 1e-30], np.float32), "b": np.zeros((2, 2), np.float32)}
TINY = float(np.finfo(np.float32).smallest_subnormal)
BELIEVED = st.floats(min_value=-VALUE_MAX, max_value=VALUE_MAX, width=32)


def combine(strategy, updates, *, reference=REFERENCE, state=None, outliers=0.2):
    sums = strategy.init(reference)
    made = [
        Update(
            {n: np.asarray(v, np.float64) for n, v in values.items()},
            reference,
            weight,
            device_id=f"d{weight}",
        )
        for values, weight in updates
    ]
    for update in made:
        sums = strategy.add(sums, update)
    if strategy.choose:
        return strategy.choose(Gathered((), lambda: iter(made), reference, 1, outliers)), state or {}
    return strategy.finish(sums, reference, state or {})


def random_updates(num, *, scale=1.0):
    rng = np.random.default_rng(5)
    return [
        (
            {n: (rng.standard_normal(r.shape) * scale ** rng.integers(-20, 3)) for n, r in REFERENCE.items()},
            int(rng.integers(1, 5000)),
        )
        for _ in range(num)
    ]


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].tobytes() == right[name].tobytes(), name


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_values_in_float32_count_as_they_do_in_float64(name):
    reference = {
        "b": np.zeros((2, 2), np.float32),
        "x.lora_A.weight": np.full((2, 64), 0.3, np.float32),
        "x.lora_B.weight": np.full((4, 2), 0.7, np.float32),
    }
    rng, strategy, made = np.random.default_rng(1), STRATEGIES[name](), []
    for i in range(4):
        values = {n: (r + rng.normal(0, 0.1, r.shape)).astype(np.float32) for n, r in reference.items()}
        made.append(Update(values, reference, 3 + i, device_id=f"d{i}"))
    wide = [u._replace(values={n: np.float64(v) for n, v in u.values.items()}) for u in made]
    assert_same_bits(*(versions_of(strategy, updates, reference) for updates in (made, wide)))


def versions_of(strategy, updates, reference):
    sums = strategy.init(reference)
    for update in updates:
        sums = strategy.add(sums, update)
    if strategy.choose:
        return strategy.choose(Gathered((), lambda: iter(updates), reference, 1, 0.2))
    return strategy.finish(sums, reference, {})[0]


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_order_free_to_the_bit(name):
    updates = random_updates(4, scale=10.0)
    results = [combine(STRATEGIES[name](), order) for order in permutations(updates)]
    for new, state in results[1:]:
        assert_same_bits(new, results[0][0])
        assert_same_bits(state, results[0][1])


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_the_mean_of_equals_is_equal(name):
    value = {"a": np.array([0.1, 3.0, -7.5], np.float32), "b": np.full((2, 2), -0.3, np.float32)}
    new, _ = combine(STRATEGIES[name](), [(value, 3), (value, 1000), (value, 77)])
    assert_same_bits(new, value)


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_a_tensor_nobody_holds_is_unchanged_and_types_stay(name):
    new, _ = combine(STRATEGIES[name](), [({"b": np.ones((2, 2))}, 2)])
    assert_same_bits({"a": new["a"]}, {"a": REFERENCE["a"]})
    assert {v.dtype for v in new.values()} == {np.dtype(np.float32)}
    assert {n: v.shape for n, v in new.items()} == {n: v.shape for n, v in REFERENCE.items()}


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_folding_again_after_a_restart_gives_the_same(name):
    updates = random_updates(5)
    assert_same_bits(
        combine(STRATEGIES[name](), updates)[0], combine(STRATEGIES[name](), updates[3:] + updates[:3])[0]
    )


@pytest.mark.parametrize("name", STRATEGIES)
def test_law_the_reference_is_not_written(name):
    before = {n: v.copy() for n, v in REFERENCE.items()}
    new, _ = combine(STRATEGIES[name](), [])
    new["a"] += 1
    assert_same_bits(REFERENCE, before)


def test_weighted_mean_by_hand():
    new, _ = combine(fedavg(), [({"a": [1.0, 2.0, 4.0]}, 1), ({"a": [5.0, -2.0, 0.0]}, 3)])
    assert new["a"].tolist() == [4.0, -1.0, 1.0]


def test_a_tensor_is_averaged_over_the_updates_that_hold_it():
    new, _ = combine(
        fedavg(), [({"a": [2.0, 2.0, 2.0], "b": np.ones((2, 2))}, 10), ({"a": [4.0, 4.0, 4.0]}, 10)]
    )
    assert new["a"].tolist() == [3.0, 3.0, 3.0]
    assert new["b"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_momentum_by_hand():
    reference = {"w": np.array([1.0], np.float32)}
    strategy = fedavgm(momentum=0.5)
    first, state = combine(strategy, [({"w": [3.0]}, 1)], reference=reference)
    second, state = combine(strategy, [({"w": [4.0]}, 1)], reference=first, state=state)
    assert (first["w"].item(), second["w"].item(), state["w"].item()) == (3.0, 5.0, 2.0)


@given(st.lists(BELIEVED, min_size=1, max_size=8), st.integers(1, WEIGHT_MAX))
@settings(max_examples=200, deadline=None)
def test_one_update_comes_back_to_the_bit(values, weight):
    value = np.array(values, np.float32) + np.float32(0)  # + 0: no negative zeros
    new, _ = combine(fedavg(), [({"w": value}, weight)], reference={"w": np.full_like(value, 1e-3)})
    assert new["w"].tobytes() == value.tobytes()


@pytest.mark.parametrize("value", [TINY, -TINY, 1e-38, -1e-20, VALUE_MAX, -VALUE_MAX, 1 / 3])
def test_one_update_of_any_magnitude_comes_back_to_the_bit(value):
    wanted = np.array([value, 1.0], np.float32)
    new, _ = combine(
        fedavg(),
        [({"w": wanted}, 12345), ({"w": wanted}, 7)],
        reference={"w": np.array([VALUE_MAX, TINY], np.float32)},
    )
    assert new["w"].tobytes() == wanted.tobytes()


@given(st.lists(st.tuples(BELIEVED, st.integers(1, WEIGHT_MAX)), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_mean_is_the_exact_mean_rounded(pairs):
    new, _ = combine(
        fedavg(), [({"w": np.array([v])}, n) for v, n in pairs], reference={"w": np.zeros(1, np.float32)}
    )
    exact = sum(Fraction(v) * n for v, n in pairs) / sum(n for _, n in pairs)
    assert (
        abs(Fraction(float(new["w"][0])) - exact)
        <= abs(exact) * Fraction(1, 2**24) * Fraction(10001, 10000) + Fraction(TINY) / 2
    )


@given(st.permutations(range(6)))
@settings(max_examples=50, deadline=None)
def test_the_sums_themselves_are_order_free(order):
    updates = random_updates(6, scale=10.0)
    plain, shuffled = init_sums(REFERENCE), init_sums(REFERENCE)
    for values, weight in updates:
        add_to_sums(plain, values, weight)
    for i in order:
        add_to_sums(shuffled, *updates[i])
    for name in REFERENCE:
        assert [limb.tolist() for limb in plain.limbs(name)] == [
            limb.tolist() for limb in shuffled.limbs(name)
        ]


@pytest.mark.parametrize("row", CODEC_ROWS, ids=str)
def test_the_sums_of_what_a_codec_conveys_are_order_free(row):
    codec = make_codec(*row)
    sent = [({n: np.float32(v) for n, v in values.items()}, weight) for values, weight in random_updates(4)]
    updates = [
        (unpack(codec, pack(codec, v, REFERENCE).payload, REFERENCE).values, weight) for v, weight in sent
    ]
    results = [combine(fedavg(), order)[0] for order in permutations(updates)]
    for new in results[1:]:
        assert_same_bits(new, results[0])


def test_a_scalar_tensor_is_averaged():
    reference = {"s": np.array(0.5, np.float32)}
    new, _ = combine(fedavg(), [({"s": np.array(1.5)}, 1), ({"s": np.array(2.5)}, 1)], reference=reference)
    assert new["s"].shape == ()
    assert new["s"] == 2.0


def test_memory_does_not_grow_with_the_number_of_updates():
    state = init_sums(REFERENCE)
    for values, weight in random_updates(50, scale=10.0):
        add_to_sums(state, values, weight)
    assert all(len(state.limbs(name)) <= 4 for name in REFERENCE)


@pytest.mark.parametrize(
    ("values", "weight", "said"),
    [
        ({"a": np.array([np.nan, 0, 0])}, 1, "a: a value that is not finite"),
        ({"a": np.array([np.inf, 0, 0])}, 1, "a: a value that is not finite"),
        ({"a": np.array([VALUE_MAX * 1.01, 0, 0])}, 1, "beyond 1048576"),
        ({"a": np.zeros(3)}, 0, "0 samples"),
        ({"a": np.zeros(3)}, -4, "-4 samples"),
        ({"a": np.zeros(3)}, WEIGHT_MAX + 1, "samples"),
        ({"a": np.zeros(4)}, 1, "shape [4], expected [3]"),
        ({"b": np.zeros((2, 2)), "x": np.zeros(3)}, 1, "x: unknown tensor"),
    ],
)
def test_an_implausible_update_adds_nothing(values, weight, said):
    state = init_sums(REFERENCE)
    with pytest.raises(WireError, match=said.replace("[", r"\[").replace("]", r"\]")):
        add_to_sums(state, values, weight)
    assert not any(limb.any() for name in REFERENCE for limb in state.limbs(name))
    assert not any(state.weights.values())


def test_every_strategy_is_told_of_in_the_docs():
    told = (ROOT / "docs" / "operate.md").read_text()
    assert [name for name in STRATEGIES if f"`{name}`" not in told] == []


def test_unknown_strategy_lists_what_there_is():
    with pytest.raises(
        UnknownName,
        match="no strategy 'fedprox'; have: fedavg, fedavgm, hetlora, krum, median, multi-krum, own-last, product",
    ):
        STRATEGIES["fedprox"]
