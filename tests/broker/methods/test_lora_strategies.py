"""Strategies that know the pairs of a LoRA: B (out, r) times A (r, in)."""

from itertools import permutations

import numpy as np
import pytest

from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.hetlora import hetlora, rank_mean
from fleetune.broker.methods.product import factors, multiplied, product
from fleetune.broker.methods.strategies import OF_RANKS, STRATEGIES
from fleetune.broker.methods.strategy import VALUE_MAX, Update
from fleetune.device_runtime.contracts.lora import cut
from fleetune.device_runtime.errors import WireError

A, B = "m.query.lora_A.weight", "m.query.lora_B.weight"
RANK = 4


def drawn(seed, rank=RANK):
    rng = np.random.default_rng(seed)
    shapes = {A: (rank, 6), B: (5, rank), "head": (3,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


REFERENCE = drawn(0)
THREE = [(drawn(1), 10), (drawn(2), 20), (drawn(3), 70)]


def combine(strategy, updates, *, reference=REFERENCE):
    sums = strategy.init(reference)
    for values, weight in updates:
        sums = strategy.add(
            sums, Update({n: v.astype(np.float64) for n, v in values.items()}, reference, weight)
        )
    return strategy.finish(sums, reference, {})[0]


def dense(values):
    return values[B].astype(np.float64) @ values[A].astype(np.float64)


def same(left, right):
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)


def best_of_rank(matrix, rank):
    u, s, v = np.linalg.svd(matrix)
    return u[:, :rank] @ np.diag(s[:rank]) @ v[:rank]


@pytest.mark.parametrize("name", OF_RANKS)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 2, 4), (2, 2, 2)], ids=str)
def test_law_the_order_of_arrival_changes_no_bit(name, ranks):
    updates = [(cut(values, rank), n) for (values, n), rank in zip(THREE, ranks, strict=True)]
    made = [combine(STRATEGIES[name](), order) for order in permutations(updates)]
    assert all(same(made[0], other) for other in made[1:])


@pytest.mark.parametrize("name", OF_RANKS)
def test_law_equal_updates_are_the_next_version(name):
    made = combine(STRATEGIES[name](), [(drawn(1), n) for n in (3, 1000, 77)])
    assert np.allclose(dense(made), dense(drawn(1)), atol=1e-6)
    assert made["head"].tobytes() == drawn(1)["head"].tobytes()
    if name != "product":
        assert same(made, drawn(1))


@pytest.mark.parametrize("name", OF_RANKS)
def test_law_shapes_and_types_stay_and_a_module_that_nobody_holds_is_unchanged(name):
    made = combine(STRATEGIES[name](), [({"head": np.ones(3)}, 5)])
    assert made["head"].tolist() == [1, 1, 1]
    assert same({n: made[n] for n in (A, B)}, {n: REFERENCE[n] for n in (A, B)})
    whole = combine(STRATEGIES[name](), THREE)
    assert {n: (v.shape, v.dtype) for n, v in whole.items()} == {
        n: (v.shape, v.dtype) for n, v in REFERENCE.items()
    }


@pytest.mark.parametrize("name", OF_RANKS)
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({A: np.full((4, 6), np.nan)}, "not finite"),
        ({A: np.full((4, 6), 2 * VALUE_MAX)}, "beyond 1048576"),
        ({B: np.full((5, 4), 1e300)}, "beyond 1048576"),
        ({"head": np.full(3, np.inf)}, "not finite"),
        ({A: np.zeros((4, 6)), "strange": np.zeros(3)}, "strange: unknown tensor"),
    ],
)
def test_an_implausible_update_adds_nothing(name, values, said):
    strategy = STRATEGIES[name]()
    sums = strategy.init(REFERENCE)
    with pytest.raises(WireError, match=said):
        strategy.add(sums, Update(values, REFERENCE, 1))
    assert not any(sums.weights.values())
    assert same(strategy.finish(sums, REFERENCE, {})[0], REFERENCE)


@pytest.mark.parametrize("name", ["hetlora", "rank-mean"])
def test_a_large_value_does_not_hide_behind_a_small_weight(name):
    strategy = STRATEGIES[name]()
    sums, values = strategy.init(REFERENCE), {A: np.full((4, 6), 2 * VALUE_MAX), B: np.full((5, 4), 1e-9)}
    with pytest.raises(WireError, match="beyond 1048576"):
        strategy.add(sums, Update(values, REFERENCE, 1))


def test_product_is_the_best_of_its_rank_for_the_mean_of_the_products():
    mean = sum(n * dense(values) for values, n in THREE) / 100
    made = combine(product(), THREE)
    assert np.allclose(dense(made), best_of_rank(mean, RANK), atol=1e-6)
    assert not np.allclose(dense(combine(fedavg(), THREE)), dense(made), atol=0.05)
    head = sum(n * values["head"].astype(np.float64) for values, n in THREE) / 100
    assert made["head"].tobytes() == head.astype(np.float32).tobytes()


def test_product_is_exact_where_all_share_an_a():
    """The mean then has the rank of the artifact: nothing is lost."""
    updates = [({**values, A: REFERENCE[A]}, n) for values, n in THREE]
    mean = sum(n * dense(values) for values, n in updates) / 100
    assert np.allclose(dense(combine(product(), updates)), mean, atol=1e-6)
    without = [({n: v for n, v in values.items() if n != A}, n) for values, n in updates]
    assert same(combine(product(), without), combine(product(), updates)), (
        "an A that did not change need not be sent"
    )


def test_product_takes_lower_ranks_with_the_whole_of_what_they_learned():
    updates = [(cut(values, rank), n) for (values, n), rank in zip(THREE, (1, 2, 1), strict=True)]
    mean = sum(n * dense(values) for values, n in updates) / 100
    assert np.allclose(dense(combine(product(), updates)), mean, atol=1e-6), "ranks 1 + 2 + 1 fit in 4"


def test_factors_multiply_to_the_matrix_and_keep_every_component_alive():
    matrix = dense(cut(drawn(1), 2))
    b, a = factors(matrix, RANK)
    assert np.allclose(b @ a, matrix)
    assert np.allclose(a @ a.T, np.eye(RANK)), "also of the components that are worth nothing"
    assert np.allclose(np.linalg.norm(b, axis=0), np.linalg.svd(matrix)[1][:RANK])
    largest = np.abs(a).argmax(axis=1)
    assert (a[np.arange(RANK), largest] > 0).all()


@pytest.mark.parametrize(("out", "inputs"), [(24, 16), (16, 24)])
def test_a_decomposition_that_does_not_converge_is_made_another_way(monkeypatch, out, inputs):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(out, RANK)) @ rng.normal(size=(RANK, inputs))
    b, _ = factors(matrix, RANK + 2)

    def diverges(*_, **__):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(np.linalg, "svd", diverges)
    other_b, other_a = factors(matrix, RANK + 2)
    np.testing.assert_allclose(other_b @ other_a, matrix, atol=1e-6)
    np.testing.assert_allclose(other_b[:, :RANK], b[:, :RANK], atol=1e-6)
    np.testing.assert_allclose(other_a @ other_a.T, np.eye(RANK + 2), atol=1e-9)


def test_signs_do_not_depend_on_the_factors_that_made_the_product():
    turned = {**drawn(1), A: -drawn(1)[A], B: -drawn(1)[B]}
    assert same(combine(product(), [(turned, 3)]), combine(product(), [(drawn(1), 3)]))


def test_a_product_of_no_learning_changes_nothing_that_the_model_computes():
    made = combine(product(), [({A: REFERENCE[A], B: REFERENCE[B]}, 5)])
    assert np.allclose(dense(made), dense(REFERENCE), atol=1e-6)


def test_the_a_of_a_convolution_is_multiplied_as_a_matrix():
    a, b = np.arange(24.0).reshape(2, 3, 2, 2), np.arange(10.0).reshape(5, 2, 1, 1)
    assert multiplied(b, a).tolist() == (b.reshape(5, 2) @ a.reshape(2, 12)).tolist()
    reference = {A: a.astype(np.float32), B: b.astype(np.float32)}
    for name in OF_RANKS:
        made = combine(STRATEGIES[name](), [(reference, 2)], reference=reference)
        assert {n: v.shape for n, v in made.items()} == {A: a.shape, B: b.shape}


def test_rank_mean_counts_a_component_where_it_is_held_by_hand():
    reference = {A: np.full((2, 1), 9.0, np.float32), B: np.full((1, 2), 9.0, np.float32)}
    one = {A: np.array([[2.0]]), B: np.array([[4.0]])}
    two = {A: np.array([[6.0], [5.0]]), B: np.array([[8.0, 7.0]])}
    made = combine(rank_mean(), [(one, 10), (two, 30)], reference=reference)
    assert made[A].tolist() == [[5.0], [5.0]]
    assert made[B].tolist() == [[7.0, 7.0]]
    assert combine(rank_mean(), [(one, 10)], reference=reference)[A].tolist() == [[2.0], [9.0]]


def partial(seed, rows):
    values = drawn(seed)
    return {A: values[A][rows], B: values[B][:, rows], "head": values["head"]}


def combine_rows(strategy, updates):
    sums = strategy.init(REFERENCE)
    for values, weight, rows in updates:
        at = {A: np.array(rows), B: np.array(rows)}
        sums = strategy.add(sums, Update(values, REFERENCE, weight, rows=at))
    return strategy.finish(sums, REFERENCE, {})[0]


@pytest.mark.parametrize("name", ["rank-mean", "hetlora"])
def test_components_are_averaged_over_those_who_sent_them_and_others_stay(name):
    one, two = partial(1, [1, 3]), partial(2, [2, 3])
    made = combine_rows(STRATEGIES[name](), [(one, 10, [1, 3]), (two, 30, [2, 3])])
    assert made[A][0].tobytes() == REFERENCE[A][0].tobytes()
    assert made[B][:, 0].tobytes() == REFERENCE[B][:, 0].tobytes()
    assert np.allclose(made[A][1:3], [one[A][0], two[A][0]], atol=1e-6)
    assert np.allclose(made[B][:, 1:3], np.stack([one[B][:, 0], two[B][:, 0]], 1), atol=1e-6)
    if name == "rank-mean":
        met = (10 * one[A][1].astype(np.float64) + 30 * two[A][1].astype(np.float64)) / 40
        assert made[A][3].tobytes() == met.astype(np.float32).tobytes()


def test_rows_of_all_devices_alike_by_hand():
    reference = {A: np.full((3, 1), 9.0, np.float32), B: np.full((1, 3), 9.0, np.float32)}
    strategy, rows = rank_mean(), {A: np.array([2]), B: np.array([2])}
    sums = strategy.init(reference)
    for a, b, weight in ((2.0, 4.0, 10), (6.0, 8.0, 30)):
        sums = strategy.add(
            sums, Update({A: np.array([[a]]), B: np.array([[b]])}, reference, weight, rows=rows)
        )
    made, _ = strategy.finish(sums, reference, {})
    assert made[A].tolist() == [[9.0], [9.0], [5.0]]
    assert made[B].tolist() == [[9.0, 9.0, 7.0]]


def test_hetlora_weighs_rows_by_the_norm_of_their_own_product_also_without_an_a():
    """One sends B alone: its A is the reference's at the same rows. Norms 2 x 3 = 6 and 4 x 3 = 12."""
    reference = {A: np.array([[5.0], [3.0]], np.float32), B: np.zeros((1, 2), np.float32)}
    strategy, rows = hetlora(), {A: np.array([1]), B: np.array([1])}
    sums = strategy.init(reference)
    for b in (2.0, 4.0):
        sums = strategy.add(sums, Update({B: np.array([[b]])}, reference, 1, rows=rows))
    made, _ = strategy.finish(sums, reference, {})
    assert made[B][0].tolist() == [0.0, pytest.approx((2 * 6 + 4 * 12) / 18)]


def test_product_of_rows_counts_all_other_components_as_the_version_has_them():
    updates = [(partial(1, [1, 3]), 10, [1, 3]), (partial(2, [0]), 30, [0])]
    wholes = []
    for values, weight, rows in updates:
        whole = {name: value.copy() for name, value in REFERENCE.items()}
        whole[A][rows], whole[B][:, rows] = values[A], values[B]
        wholes.append((whole, weight))
    made = combine_rows(product(), updates)
    assert np.allclose(
        dense(made), best_of_rank(sum(n * dense(whole) for whole, n in wholes) / 40, RANK), atol=1e-6
    )


@pytest.mark.parametrize("name", OF_RANKS)
def test_an_update_of_more_or_fewer_rows_than_were_drawn_adds_nothing(name):
    strategy = STRATEGIES[name]()
    for sent in ([1], [0, 1, 2]):
        sums = strategy.init(REFERENCE)
        with pytest.raises(WireError, match=r"implausible update: .*components"):
            strategy.add(
                sums,
                Update(partial(1, sent), REFERENCE, 1, rows={A: np.array([1, 3]), B: np.array([1, 3])}),
            )
        assert not any(sums.weights.values())


def test_hetlora_weighs_by_the_norm_of_the_product_by_hand():
    """Norms of B A: 2 x 4 = 8, and |(6 x 1 + 0 x 3)| = 6; with samples 3 x 8 to 4 x 6: equal shares."""
    reference = {A: np.zeros((2, 1), np.float32), B: np.zeros((1, 2), np.float32)}
    one = {A: np.array([[2.0]]), B: np.array([[4.0]])}
    two = {A: np.array([[6.0], [0.0]]), B: np.array([[1.0, 3.0]])}
    made = combine(hetlora(), [(one, 3), (two, 4)], reference=reference)
    assert made[A].tolist() == [[4.0], [0.0]]
    assert made[B].tolist() == [[2.5, 3.0]]


def test_hetlora_of_an_update_without_its_a_takes_the_reference_s():
    reference = {A: np.array([[3.0]], np.float32), B: np.zeros((1, 1), np.float32)}
    made = combine(hetlora(), [({B: np.array([[1.0]])}, 1), ({B: np.array([[2.0]])}, 1)], reference=reference)
    assert made[A].tolist() == [[3.0]]
    assert made[B].item() == pytest.approx((3 * 1 + 6 * 2) / 9)


def test_an_update_that_learned_nothing_still_counts_a_little():
    reference = {A: np.array([[3.0]], np.float32), B: np.zeros((1, 1), np.float32)}
    made = combine(hetlora(), [({A: np.array([[1.0]]), B: np.zeros((1, 1))}, 1)], reference=reference)
    assert made[A].tolist() == [[1.0]]
