"""The private mean by hand, without noise and with it."""

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.methods.averaging import fedavg, fedavgm
from fleetune.broker.methods.private_mean import private_mean
from fleetune.broker.methods.strategy import VALUE_MAX, Update
from fleetune.device_runtime.errors import WireError

REFERENCE = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([5.0], np.float32)}


def mean_of(updates, *, inner=None, reference=REFERENCE, state=None, expected=4, still=(), **privacy):
    settings = Privacy(**{"name": "central", "clip": 5.0, **privacy})
    strategy = private_mean(inner or fedavg(), settings, expected=expected, still=still, source=os.urandom)
    sums = strategy.init(reference)
    for values, weight in updates:
        values = {n: np.asarray(v, np.float64) for n, v in values.items()}
        sums = strategy.add(sums, Update(values, reference, weight))
    return strategy.finish(sums, reference, state or {})


def test_all_weigh_the_same_and_the_sum_is_divided_by_those_asked():
    near, far = {"a": [1.0, 2.0], "b": [9.0]}, {"a": [1.0, 32.0], "b": [45.0]}  # norms 4 and 50
    new, _ = mean_of([(near, 1), (far, 1000)])
    np.testing.assert_allclose(new["a"], [1.0, 2.0 + 3.0 / 4], rtol=1e-6)
    np.testing.assert_allclose(new["b"], [5.0 + (4.0 + 4.0) / 4], rtol=1e-6)


def test_without_updates_nothing_moves_and_a_tensor_that_nobody_sent_is_no_larger_mean():
    new, _ = mean_of([])
    assert all(np.array_equal(new[name], REFERENCE[name]) for name in REFERENCE)
    new, _ = mean_of([({"b": [6.0]}, 1), ({"a": [1.0, 2.0]}, 1)])
    np.testing.assert_allclose(new["b"], [5.25])


@given(st.lists(st.floats(-1000, 1000), min_size=3, max_size=3), st.floats(0.01, 100))
def test_one_device_moves_the_mean_no_further_than_its_bound(values, clip):
    others = [({"a": [1.5, 2.0], "b": [4.0]}, 7)]
    mine = ({"a": values[:2], "b": values[2:]}, 2**29)
    without, with_me = (mean_of(u, clip=clip)[0] for u in (others, [*others, mine]))
    moved = math.sqrt(sum(float(np.square(np.float64(with_me[n]) - without[n]).sum()) for n in REFERENCE))
    assert moved <= clip / 4 + 1e-4


def test_noise_has_its_standard_deviation_in_every_tensor_that_may_learn():
    size = 100_000
    reference = {name: np.zeros(size, np.float32) for name in ("sent", "unsent", "still")}
    new, _ = mean_of(
        [({"sent": np.zeros(size)}, 1)], reference=reference, still=("still",), clip=3.0, noise=2.0
    )
    for name in ("sent", "unsent"):
        assert abs(new[name].std() / (2.0 * 3.0 / 4) - 1) < 10 / math.sqrt(2 * size)
    assert abs(np.corrcoef(new["sent"], new["unsent"])[0, 1]) < 10 / math.sqrt(size)
    assert not new["still"].any()


def test_what_comes_of_a_still_tensor_is_left_out_of_norm_and_mean():
    new, _ = mean_of([({"a": [1.0, 6.0], "b": [1e6]}, 1)], still=("b",))
    np.testing.assert_allclose(new["a"], [1.0, 3.0])
    assert new["b"] == 5.0


@pytest.mark.parametrize("name", ["distributed", "local"])
def test_what_has_its_noise_is_neither_bounded_nor_given_more(name):
    new, _ = mean_of([({"b": [5.0 + 400.0]}, 9)], name=name, noise=100.0)
    assert new["b"] == 105.0
    assert np.array_equal(new["a"], REFERENCE["a"])


def test_momentum_comes_after_the_noise():
    new, state = mean_of([({"b": [9.0]}, 1)], inner=fedavgm(), state={"b": np.array([10.0])})
    assert new["b"] == 5.0 + 0.9 * 10.0 + 1.0
    assert state["b"] == 10.0


def test_noise_beyond_all_measure_leaves_values_that_are_believed():
    new, _ = mean_of([], clip=1e6, noise=1e6)
    assert all(np.all(np.abs(value) <= VALUE_MAX) for value in new.values())
    mean_of([], reference=new, clip=1e6, noise=1e6)


@pytest.mark.parametrize(
    ("values", "said"),
    [({"a": [np.nan, 0]}, "not finite"), ({"c": [1.0]}, "c: unknown tensor"), ({"a": [1.0]}, r"shape \[1\]")],
)
def test_an_update_that_cannot_be_is_refused(values, said):
    with pytest.raises(WireError, match=said):
        mean_of([(values, 1)])
