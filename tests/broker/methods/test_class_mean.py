from itertools import permutations

import numpy as np
import pytest
from tiny import noisy_adapter

from fleetune.broker.methods.class_mean import SUM_MAX, class_mean
from fleetune.broker.methods.strategy import Update
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, class_head
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.training.class_means import class_sums

REFERENCE = {
    "head.weight": np.ones((3, 2), np.float32),
    "head.bias": np.ones(3, np.float32),
    "a": np.full(4, 7.0, np.float32),
}
GOOD = {SUMS: [[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]], COUNTS: [2.0, 3.0, 0.0], SQUARES: [4.0, 3.5, 0.0]}


@pytest.fixture(scope="module")
def head(word_artifact):
    return class_head(open_artifact(word_artifact).manifest)


def update(num_samples=5, **changes):
    values = {n: np.asarray(v, np.float64) for n, v in {**GOOD, **changes}.items() if v is not None}
    return Update(values, REFERENCE, num_samples)


def combine(head, updates, reference=REFERENCE):
    strategy = class_mean(head)
    sums = strategy.init(reference)
    for one in updates:
        sums = strategy.add(sums, one)
    return strategy.finish(sums, reference, {})


def test_devices_with_parts_of_the_data_give_the_head_of_all_of_it(word_artifact, word_file, head):
    """Four devices, by label and so one with a class of its own, one with a single sample."""
    artifact = open_artifact(word_artifact)
    adapter = noisy_adapter(artifact)
    with open_engine(artifact, threads=1) as engine:
        pooled = load_dataset(word_file, artifact.manifest, word_artifact, seq_len=16)
        of_a, others = np.flatnonzero(pooled.labels == 0), np.flatnonzero(pooled.labels != 0)
        parts = [of_a, others[:1], others[1:30], others[30:]]
        updates = []
        for part in parts:
            sums = class_sums(engine, pooled.subset(part), adapter)
            travelled = {n: v.astype(np.float32).astype(np.float64) for n, v in sums.items()}
            updates.append(Update(travelled, adapter, len(part)))
        made, state = combine(head, updates, adapter)
        wanted = class_mean_head(class_sums(engine, pooled, adapter), head)
    assert state == {}
    for name, value in wanted.items():
        np.testing.assert_allclose(made[name], value, atol=1e-5 * np.abs(value).max())
    rest = made.keys() - wanted.keys()
    assert made.keys() == adapter.keys()
    assert all(made[name] is adapter[name] for name in rest), "nothing else changes"


def test_the_order_of_arrival_changes_no_bit(head):
    rng = np.random.default_rng(0)
    updates = []
    for scale in (1.0, 1e4, 1e-4):
        x, y = scale * rng.normal(size=(9, 2)), rng.integers(0, 3, 9)
        is_of = np.eye(3)[y]
        sums = {SUMS: is_of.T @ x, COUNTS: is_of.sum(0), SQUARES: is_of.T @ np.square(x).sum(1)}
        updates.append(update(9, **{n: v.astype(np.float32) for n, v in sums.items()}))
    first, *others = [combine(head, order)[0] for order in permutations(updates)]
    for other in others:
        assert all(other[name].tobytes() == first[name].tobytes() for name in first)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({SUMS: [[np.nan, 0], [0, 3], [0, 0]]}, "longer than class_means.squares allow"),
        ({SUMS: [[1e300, 0], [0, 3], [0, 0]]}, "longer than class_means.squares allow"),
        ({SUMS: [[2 * SUM_MAX, 0], [0, 3], [0, 0]], SQUARES: [4e30, 3.5, 0]}, "not finite or beyond"),
        ({SUMS: [[2, 0], [0, 3], [1, 0]]}, "longer than class_means.squares allow"),
        ({SUMS: [[3, 0], [0, 3], [0, 0]]}, "longer than class_means.squares allow"),
        ({COUNTS: [2, -3, 0]}, "negative or not whole"),
        ({COUNTS: [2, 2.5, 0]}, "negative or not whole"),
        ({COUNTS: [np.nan, 3, 0]}, "negative or not whole"),
        ({COUNTS: [2, 4, 0]}, "6 samples with a class, of 5"),
        ({COUNTS: [2, 1e300, 0]}, "samples with a class, of 5"),
        ({COUNTS: [0, 0, 0]}, "0 samples with a class, of 5"),
        ({SQUARES: [-4, 3.5, 0]}, "longer than class_means.squares allow"),
        ({SQUARES: [np.nan, 3.5, 0]}, "longer than class_means.squares allow"),
        ({SQUARES: None}, "class_means.squares: missing"),
        ({COUNTS: [2, 3]}, "shape \\[2\\], expected \\[3\\]"),
        ({"a": [1.0]}, "a: unknown tensor"),
    ],
)
def test_what_cannot_be_the_sums_of_so_many_samples_is_refused_and_adds_nothing(head, changes, said):
    strategy = class_mean(head)
    sums = strategy.add(strategy.init(REFERENCE), update())
    with pytest.raises(WireError, match=said):
        strategy.add(sums, update(**changes))
    assert (
        strategy.finish(sums, REFERENCE, {})[0]["head.bias"].tobytes()
        == combine(head, [update()])[0]["head.bias"].tobytes()
    )


def test_a_short_head_shares_its_lowest_bits_with_the_version_before_and_is_the_same_to_half_precision(head):
    exact, _ = combine(head, [update()])
    strategy = class_mean(head, is_short=True)
    reference = {n: v + np.float32(0.1) for n, v in REFERENCE.items()}
    short, _ = strategy.finish(strategy.add(strategy.init(reference), update()), reference, {})
    for name in ("head.weight", "head.bias"):
        difference = short[name].view("u4") ^ reference[name].view("u4")
        assert not (difference % (1 << 13)).any()
        np.testing.assert_allclose(short[name], exact[name], rtol=2.0**-10, atol=1e-30)
    assert short["a"] is reference["a"]
