"""Schedules, protected layers and row gates, over many specs."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.plans import Mode, full, trained_layers
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.methods.policies import frozen_below, make_gates, make_policy
from fleetune.device_runtime.methods.protection import EFFECTS, outermost, protected_layers
from fleetune.device_runtime.methods.schedules import SCHEDULES
from fleetune.device_runtime.methods.shapes import RATE_MAX, SHAPES, drop_rates, num_kept

DRAWN = {"bernoulli": Mode.DROP, "exact-k": Mode.DROP, "dropbp": Mode.BYPASS, "coto": Mode.BARE}
MIDDLE = [0.1, 0.2, 0.9, 0.4, 0.4, 0.7, 0.1, 0.1, 0.2, 0.3, 0.3, 0.0]
HORIZON = 40


@st.composite
def drawn_specs(draw, names=tuple(DRAWN), gates="batch"):
    name, schedule = draw(st.sampled_from(names)), draw(st.sampled_from(sorted(SCHEDULES)))
    protected = draw(st.integers(0, 5))
    spec = PolicySpec(
        name=name,
        drop=draw(st.floats(0, 0.94)),
        shape=draw(st.sampled_from(sorted(SHAPES))),
        schedule=schedule,
        horizon=HORIZON * (schedule != "constant"),
        protected=protected,
        protect=draw(st.sampled_from(("ends", "effect"))) if protected else "ends",
        width=draw(st.integers(0, 12)) if name in ("dropbp", "coto") else 0,
        gates=gates,
    )
    size = spec.width or 12
    assume(not spec.drop or protected <= min(size - 1, num_kept(size, drop=spec.drop)))
    return spec


def planned(spec, step, seed=3):
    return make_policy(spec, 12)(step, Draws(seed, "plans", step), {EFFECTS: MIDDLE})


@given(drawn_specs(), st.integers(0, 2 * HORIZON))
def test_what_is_protected_or_below_the_width_is_never_dropped(spec, step):
    lowest = 12 - (spec.width or 12)
    plan = planned(spec, step)
    stays = protected_layers(12, spec, {EFFECTS: MIDDLE}, lowest=lowest)
    assert len(stays) == min(spec.protected, 12 - lowest)
    assert {plan[i] for i in stays} <= {Mode.TRAIN}
    assert set(plan[:lowest]) <= {Mode.FORWARD}
    assert set(plan[lowest:]) <= {Mode.TRAIN, DRAWN[spec.name]}
    assert trained_layers(plan)


@given(drawn_specs(), st.integers(HORIZON, 10**6))
def test_from_the_horizon_on_nothing_is_dropped(spec, step):
    assume(spec.schedule != "constant")
    lowest = 12 - (spec.width or 12)
    assert planned(spec, step) == (Mode.FORWARD,) * lowest + (Mode.TRAIN,) * (12 - lowest)


@given(drawn_specs(names=("exact-k", "dropbp")), st.integers(0, HORIZON))
def test_so_many_train_as_the_share_of_the_step_says(spec, step):
    """The share by hand, of the layers that take part."""
    left = {"constant": 1.0, "falling": max(0, HORIZON - step) / HORIZON, "tail": float(step < HORIZON)}
    size = spec.width or 12
    exact = size * (1 - spec.drop * left[spec.schedule])
    count = len(trained_layers(planned(spec, step)))
    assert abs(count - exact) <= 0.5 + 1e-9 or count == 1


@pytest.mark.parametrize("name", ["bernoulli", "coto"])
@pytest.mark.parametrize(
    ("schedule", "step", "share"),
    [
        ("constant", 99, 0.6),
        ("falling", 0, 0.6),
        ("falling", 10, 0.45),
        ("falling", 30, 0.15),
        ("tail", 39, 0.6),
    ],
)
def test_rates_follow_the_schedule(name, schedule, step, share):
    spec = PolicySpec(
        name=name, drop=0.6, schedule=schedule, horizon=HORIZON * (schedule != "constant"), protected=2
    )
    policy, times = make_policy(spec, 12), 1500
    out = [
        sum(mode is DRAWN[name] for mode in policy(step, Draws(seed, "plans", step), {}))
        for seed in range(times)
    ]
    assert np.mean(out) == pytest.approx(12 * share, abs=5 * math.sqrt(12 * 0.25 / times))


@given(st.integers(2, 24), st.floats(0, 0.9), st.sampled_from(sorted(SHAPES)), st.integers(0, 23))
def test_rates_beside_protected_layers_keep_the_mean(num_layers, drop, shape, protected):
    assume(protected < num_layers)
    stays = outermost(0, num_layers)[:protected]
    rates = drop_rates(num_layers, drop=drop, shape=shape, protected=stays)
    reachable = RATE_MAX * (num_layers - protected) / num_layers
    assert rates.mean() == pytest.approx(min(drop, reachable), abs=1e-9)
    assert not rates[stays].any()
    assert rates.max() <= RATE_MAX


@given(
    drawn_specs(names=("bernoulli", "exact-k"), gates="row"),
    st.integers(0, 2 * HORIZON),
    st.integers(1, 20),
)
def test_each_layer_runs_on_exactly_its_share_of_the_rows(spec, step, num_rows):
    state, drawn = {EFFECTS: MIDDLE}, Draws(3, "plans", step)
    assert make_policy(spec, 12)(step, drawn, state) == full(12)
    gates = make_gates(spec, 12)(step, drawn, state, num_rows)
    assert (gates.dtype, gates.shape) == (np.bool_, (12, num_rows))
    stays = protected_layers(12, spec, state)
    rates = drop_rates(
        12,
        drop=SCHEDULES[spec.schedule](spec.drop, spec.horizon, step),
        shape=spec.shape,
        protected=stays,
    )
    wanted = [round(num_rows * (1 - rate)) for rate in rates]
    if any(wanted):
        assert gates.sum(1).tolist() == wanted
    else:
        assert sorted(gates.sum(1).tolist()) == [0] * 11 + [num_rows]
    assert all(gates[i].all() for i in stays)


def test_rows_are_drawn_for_each_layer_and_each_step():
    gates = make_gates(PolicySpec(name="bernoulli", drop=0.5, gates="row"), 12)
    first, second = (gates(step, Draws(3, "plans", step), {}, 16) for step in (0, 1))
    assert len({tuple(row) for row in first}) > 8
    assert (first != second).any()
    seen = np.mean([gates(s, Draws(3, "plans", s), {}, 16) for s in range(400)], axis=(0, 1))
    np.testing.assert_allclose(seen, 0.5, atol=5 * 0.5 / math.sqrt(400 * 12))


def test_a_policy_has_gates_only_for_rows():
    assert make_gates(PolicySpec(name="bernoulli", drop=0.5), 12) is None


def test_the_outermost_come_first():
    assert outermost(0, 5) == [4, 0, 3, 1, 2]
    assert outermost(8, 12) == [11, 8, 10, 9]
    assert outermost(3, 4) == [3]


def test_the_largest_effects_are_protected_and_equal_ones_from_the_ends():
    spec = PolicySpec(name="bernoulli", drop=0.25, protected=3, protect="effect")
    assert protected_layers(12, spec, {EFFECTS: MIDDLE}) == (2, 3, 5)  # 4 has what 3 has, and lies further in
    assert protected_layers(4, spec, {EFFECTS: [0.0] * 4}) == (0, 2, 3)


@pytest.mark.parametrize("state", [{}, {EFFECTS: [0.1, 0.2]}])
def test_effects_that_are_not_there_are_asked_for(state):
    spec = PolicySpec(name="bernoulli", drop=0.25, protected=3, protect="effect")
    with pytest.raises(ConfigError, match=r"protects layers by their effect: [02] measured, of 12 layers"):
        make_policy(spec, 12)(0, Draws(0, "plans", 0), state)


def test_only_the_width_says_what_is_frozen_for_good():
    assert frozen_below(PolicySpec(name="dropbp", drop=0.5, width=4), 12) == 8
    assert frozen_below(PolicySpec(name="coto", drop=0.5), 12) == 0
    assert frozen_below(PolicySpec(name="exact-k", drop=0.5), 12) == -1
    assert frozen_below(PolicySpec(name="suffix", drop=0.5), 12) == -1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "falling"}, "needs a horizon of at least 1 step for its schedule 'falling', got 0"),
        ({"horizon": 5}, "has no use for horizon, got 5, with schedule 'constant'"),
        ({"protect": "effect"}, "has no use for protect, got 'effect', with 0 layers protected"),
        ({"protected": 12, "drop": 0.01}, "cannot drop 0.01 of 12 layers with 12 protected"),
        ({"protected": 7}, "cannot drop 0.5 of 12 layers with 7 protected"),
        ({"name": "dropbp", "width": 4, "protected": 3}, "cannot drop 0.5 of 4 layers with 3 protected"),
        ({"name": "coto", "width": 13}, "wants layers 0 to 12; the model's last is 11"),
        ({"name": "dropbp", "gates": "row"}, "has no use for gates, got 'row'; policies that have: bernoulli, exact-k"),
        ({"horizon": -1}, "horizon must be at least 0, got -1"),
        ({"horizon": 10**300}, "horizon must be at most 2147483647"),
        ({"protected": -1}, "protected must be at least 0, got -1"),
        ({"drop": math.nan}, "drop must be at least 0 and below 1, got nan"),
        ({"horizon": 1.5}, "horizon 1.5: Expected `int`, got `float`"),
        ({"protect": "middle"}, "no protect 'middle'; have: effect, ends"),
        ({"gates": "token"}, "no gates 'token'; have: batch, row"),
        ({"schedule": "rising"}, "no schedule 'rising'; have: constant, falling, tail"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, said):
    with pytest.raises(ConfigError) as caught:
        make_policy(PolicySpec(**{"name": "bernoulli", "drop": 0.5, **changes}), 12)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_that_makes_no_sense_is_listed_at_once():
    spec = PolicySpec(name="exact-k", drop=0.5, period=3, schedule="tail", protected=9, first=1)
    with pytest.raises(ConfigError) as caught:
        make_policy(spec, 12)
    for said in (
        "has no use for period, got 3",
        "; first, got 1",
        "needs a horizon",
        "cannot drop 0.5 of 12",
    ):
        assert said in str(caught.value)
    with pytest.raises(UnknownName, match="no schedule 'rising'"):
        make_policy(PolicySpec(name="coto", schedule="rising"), 12)
