"""Thresholds of rank components by hand: what they prune, the straight-through gradients, and what a new one moves."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.lora import trained_part
from fleetune.device_runtime.contracts.thresholds import (
    PENALTY,
    blank_thresholds,
    descended,
    moved,
    pruned,
    straight_through,
)
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import WireError

A, B, T = "m.lora_A.weight", "m.lora_B.weight", "m.lora_A.weight.threshold"
ARRAYS = {
    A: np.float32([[1, -3], [0.5, 0.5], [4, 0]]),
    B: np.ones((2, 3), np.float32),
    "head": np.ones(2, np.float32),
    T: np.float32([1.5, 0.5, 0.5]),
}
"""Mean magnitudes 2, 0.5 and 2: the middle row is not above its threshold; that of the last is beyond 1."""


def test_zeros_prune_nothing_and_are_in_no_adapter():
    blank = blank_thresholds(ARRAYS)
    assert blank.keys() == {T}
    assert blank[T].tolist() == [0, 0, 0]
    found = pruned({**ARRAYS, **blank})
    assert found.keys() == {A, B, "head"}
    assert found[A].tolist() == ARRAYS[A].tolist()


def test_rows_that_are_not_above_their_threshold_are_zero():
    assert pruned(ARRAYS)[A].tolist() == [[1, -3], [0, 0], [4, 0]]


def test_gradients_are_the_straight_through_formulas():
    grads = {A: np.float32([[2, 1], [6, -2], [1, 1]]), B: np.full((2, 3), 7, np.float32)}
    found = straight_through(grads, ARRAYS)
    # c = 2*1 - 1*3 = -1; 6*0.5 - 2*0.5 = 2; beyond 1 of the step: 0.
    np.testing.assert_allclose(found[A], [[2 - 0.5, 1 + 0.5], [0 + 1, 0 + 1], [1, 1]])
    penalty = PENALTY * np.exp(-ARRAYS[T])
    np.testing.assert_allclose(found[T], np.float32([1, -2, 0]) - penalty, rtol=1e-6)
    assert found[B] is grads[B]
    assert T not in straight_through({B: grads[B]}, ARRAYS), "a row that has no gradient teaches no threshold"


def test_a_threshold_descends_and_a_pair_that_would_lose_all_rows_begins_again():
    found = descended(ARRAYS, {T: np.float32([1, -1, 0])}, 0.1)
    np.testing.assert_allclose(found[T], [1.4, 0.6, 0.5], rtol=1e-6)
    assert descended(ARRAYS, {T: np.float32([-99, -99, -99])}, 1.0)[T].tolist() == [0, 0, 0]
    assert descended(ARRAYS, {}, 1.0)[T].tolist() == ARRAYS[T].tolist()


def test_a_row_goes_along_with_its_threshold():
    found = moved(ARRAYS, {T: np.float32([1.5, 1.5, 0.3])})
    np.testing.assert_allclose(found[A], [[1, -3], [0, 0], [4.1, 0.1]], rtol=1e-6)
    assert found[T].tolist() == np.float32([1.5, 1.5, 0.3]).tolist()
    assert ARRAYS[A].tolist() == [[1, -3], [0.5, 0.5], [4, 0]]
    assert moved({A: ARRAYS[A]}, {})[A].tolist() == ARRAYS[A].tolist()


@pytest.mark.parametrize(
    "strange",
    [{T: np.float32([np.nan, 0, 0])}, {T: np.zeros(2, np.float32)}, {"x.threshold": np.zeros(3, np.float32)}],
)
def test_thresholds_that_cannot_be_are_refused(strange):
    with pytest.raises(WireError, match="no thresholds of this adapter, or one that is not finite"):
        moved(ARRAYS, strange)


def test_thresholds_alone_travel_or_nothing():
    assert trained_part(ARRAYS, LocalWork(mask="thresholds")).keys() == {T}
    assert trained_part(ARRAYS, LocalWork(mask="nothing")) == {}
