"""Votes for a mask, by hand."""

from itertools import permutations

import numpy as np
import pytest

from fleetune.broker.methods.consensus import consensus, is_vote
from fleetune.broker.methods.strategy import Update

REFERENCE = {"w": np.ones(6, np.float32), "head": np.zeros(2, np.float32)}
"""In the order of names: head 0 and 1, w 0 to 5."""


def update(head, w):
    values = {"head": np.array(head), "w": 1.0 + np.array(w)}
    return Update(values, REFERENCE, 1)


THREE = [
    update([0.0, 5.0], [0.0, 0.0, -9.0, 1.0, 0.0, 0.0]),  # head 1, w 2
    update([0.0, 0.1], [0.0, 3.0, 2.0, 0.0, 0.0, 0.0]),  # w 1, w 2
    update([0.0, 4.0], [0.0, 3.0, 0.0, 0.0, 0.0, 0.0]),  # head 1, w 1
]


def told(mask):
    return {name: np.flatnonzero(bits).tolist() for name, bits in mask.items()}


@pytest.mark.parametrize(
    ("share", "wanted"),
    [
        (2 / 8, {"head": [1], "w": [1]}),
        (1 / 8, {"head": [1], "w": []}),
        (1.0, {"head": [1], "w": [1, 2, 3]}),
    ],
)
def test_the_elements_with_most_votes_are_kept_and_equal_ones_by_name_and_place(share, wanted):
    """With 2 of 8 each has two votes: head 1, w 1 and w 2 get two each, and the first two of them stay."""
    found = told(consensus(THREE, REFERENCE, share=share))
    assert found == {name: places for name, places in wanted.items() if places}


def test_the_order_of_arrival_changes_no_bit():
    found = [told(consensus(order, REFERENCE, share=0.25)) for order in permutations(THREE)]
    assert all(one == found[0] for one in found)


def test_votes_count_devices_not_magnitudes():
    loud = update([0.0, 0.0], [1e6, 0.0, 0.0, 0.0, 0.0, 0.0])
    quiet = [update([0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1e-6, 0.0])] * 2
    assert told(consensus([loud, *quiet], REFERENCE, share=1 / 8)) == {"w": [4]}


def test_a_tensor_that_an_update_does_not_hold_gets_no_vote_and_no_vote_is_no_mask():
    part = Update({"head": np.array([0.0, 1.0])}, REFERENCE, 1)
    assert told(consensus([part], REFERENCE, share=1.0)) == {"head": [1]}
    assert consensus([update([0.0, 0.0], np.zeros(6))], REFERENCE, share=0.5) == {}


def test_the_first_round_votes_and_each_so_many_later():
    assert [r for r in range(1, 12) if is_vote(r, 0)] == [1]
    assert [r for r in range(1, 12) if is_vote(r, 4)] == [1, 5, 9]
