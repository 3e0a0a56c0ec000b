"""The route of a step, worked out by hand: what runs there, what runs back, what is kept."""

import pytest

from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, Route, dropping, full, learnable, route

D, F, T = Mode.DROP, Mode.FORWARD, Mode.TRAIN


@pytest.mark.parametrize(
    ("plan", "memory", "expected"),
    [
        (full(3), SAVE_ALL, Route((0, 1, 2), 0, (0, 1, 2), (0, 1, 2))),
        (full(3), RECOMPUTE, Route((0, 1, 2), 0, (0, 1, 2), ())),
        (full(3), MemoryPlan(saved_layers=1), Route((0, 1, 2), 0, (0, 1, 2), (2,))),
        (full(3), MemoryPlan(saved_layers=9), Route((0, 1, 2), 0, (0, 1, 2), (0, 1, 2))),
        (dropping(4, (1, 3)), SAVE_ALL, Route((0, 2), 0, (0, 2), (0, 2))),
        ((F, D, T, F, T), MemoryPlan(saved_layers=2), Route((0, 2, 3, 4), 2, (2, 4), (3, 4))),
        ((F, F), SAVE_ALL, Route((0, 1), 2, (), ())),
        ((D, D), SAVE_ALL, Route((), 2, (), ())),
    ],
)
def test_a_route_is_what_its_plan_says(plan, memory, expected) -> None:
    assert route(plan, memory) == expected._replace(boundary=expected.lowest)


def test_the_way_back_goes_through_frozen_layers_above_a_trained_one() -> None:
    way = route((F, D, T, F, T), MemoryPlan(saved_layers=1))
    assert way.below == (0,)
    assert way.back == (2, 3, 4)
    assert way.rerun == (2, 3)
    assert way.saved == (4,)


def test_a_layer_with_nothing_to_train_runs_frozen_and_stays_dropped() -> None:
    assert learnable((T, T, F, D, T), {1, 2, 3}) == (F, T, F, D, F)
    assert route(learnable(full(3), {2})).lowest == 2  # no backward below
    assert route(learnable(full(3), ())).back == ()
