import pytest

from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.methods.personal import RANKINGS, personal_layers

IMPORTANCE = (0.5, 2.0, 0.0, 2.0, 1.0)
"""Layer 2 was not trained."""


def chosen(personal, *, by="importance", seed=0, importance=IMPORTANCE):
    return personal_layers(LocalWork(personal=personal, personal_by=by, seed=seed), importance)


def test_the_most_important_stay_and_of_equal_ones_the_lower():
    assert [chosen(n) for n in range(4)] == [(), (1,), (1, 3), (1, 3, 4)]


@pytest.mark.parametrize("by", RANKINGS)
def test_one_trained_layer_is_always_shared_and_one_that_was_not_trained_never_stays(by):
    for seed in range(20):
        kept = chosen(4, by=by, seed=seed)
        assert len(kept) == 3
        assert {*kept} < {0, 1, 3, 4}
        assert kept == tuple(sorted(kept))
        assert chosen(2, by=by, seed=seed, importance=(0.0, 0.0, 1.0)) == ()
        assert chosen(2, by=by, seed=seed, importance=(0.0, 0.0, 0.0)) == ()


def test_the_control_is_drawn_by_the_devices_seed():
    drawn = [chosen(1, by="random", seed=seed) for seed in range(200)]
    assert drawn == [chosen(1, by="random", seed=seed) for seed in range(200)]
    assert all(30 < drawn.count((layer,)) < 70 for layer in (0, 1, 3, 4))
    assert chosen(1, by="random", importance=(9, 9, 0, 1, 2)) == drawn[0], "importance has no say"


def test_from_the_top_are_those_next_to_the_head():
    assert chosen(2, by="top") == (3, 4)
