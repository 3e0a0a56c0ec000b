import math

import numpy as np
import pytest

from fleetune.device_runtime.contracts.plans import Mode, active_layers, full, trained_layers
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.methods.policies import POLICIES, make_policy
from fleetune.device_runtime.methods.shapes import RATE_MAX, SHAPES, drop_rates, num_kept
from fleetune.device_runtime.methods.suffixes import layer_groups

SHAPED = [(name, shape) for name in ("bernoulli", "exact-k", "dropbp", "coto") for shape in SHAPES]
DEPTHS = (1, 2, 6, 24)
NUM_STEPS = 1500
PERIOD = 3


def spec(name, drop, shape="uniform"):
    uses = POLICIES[name].uses
    return PolicySpec(
        name=name, drop=drop, shape=shape, period=PERIOD * ("period" in uses), width=2 * (name == "growing")
    )


def plans(policy, num_steps, seed=7):
    state = {}
    return [policy(i, Draws(seed, "plans", i), state) for i in range(num_steps)]


@pytest.mark.parametrize(
    ("name", "shape"), [*SHAPED, ("suffix", "uniform"), ("successive", "uniform"), ("cyclic", "uniform")]
)
@pytest.mark.parametrize("drop", [0.25, 0.5, 0.75])
def test_mean_trained_depth_is_as_asked(name, shape, drop):
    num_layers = 12
    mean = np.mean(
        [len(trained_layers(p)) for p in plans(make_policy(spec(name, drop, shape), num_layers), NUM_STEPS)]
    )
    deviation = math.sqrt(num_layers * 0.25 / NUM_STEPS)  # at most: a sum of coins
    nothing_left = np.prod(drop_rates(num_layers, drop=drop, shape=shape))  # then one layer survives
    assert mean == pytest.approx(num_layers * (1 - drop) + nothing_left, abs=5 * deviation)


@pytest.mark.parametrize("shape", SHAPES)
def test_bernoulli_drops_each_layer_at_its_rate(shape):
    made = plans(make_policy(spec("bernoulli", 0.4, shape), 8), NUM_STEPS)
    dropped = np.mean([[mode is Mode.DROP for mode in plan] for plan in made], axis=0)
    np.testing.assert_allclose(
        dropped, drop_rates(8, drop=0.4, shape=shape), atol=5 * 0.5 / math.sqrt(NUM_STEPS)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_k_keeps_exactly_k(shape):
    for drop, kept in ((0.3, 17), (0.5, 12), (0.99, 1)):
        made = plans(make_policy(spec("exact-k", drop, shape), 24), 100)
        assert {len(active_layers(plan)) for plan in made} == {kept}


def test_exact_k_draws_as_successive_weighted_sampling():
    """3 layers, keep 2, incremental at 1/3: rates 1/6, 1/3, 1/2, weights 5/6, 4/6, 3/6; the pairs' chances by hand."""
    made = plans(make_policy(spec("exact-k", 1 / 3, "incremental"), 3), NUM_STEPS)
    w = np.array([5, 4, 3]) / 12
    chance_01 = w[0] * w[1] / (1 - w[0]) + w[1] * w[0] / (1 - w[1])
    got = np.mean([active_layers(plan) == (0, 1) for plan in made])
    assert got == pytest.approx(chance_01, abs=5 * 0.5 / math.sqrt(NUM_STEPS))


def test_full_trains_every_layer():
    assert set(plans(make_policy(PolicySpec(), 6), 20)) == {full(6)}


def test_suffix_runs_all_and_trains_the_upper_ones():
    assert plans(make_policy(spec("suffix", 0.5), 6), 1) == [(Mode.FORWARD,) * 3 + (Mode.TRAIN,) * 3]


def trained(name, drop, num_layers, num_steps):
    """What each of the first steps trains."""
    made = plans(make_policy(spec(name, drop), num_layers), num_steps)
    assert all(len(active_layers(plan)) == num_layers for plan in made)
    return [trained_layers(plan) for plan in made]


def test_successive_climbs_by_the_group_and_stays_at_the_top():
    steps = trained("successive", 2 / 3, 6, 4 * PERIOD)
    assert steps == [(0, 1)] * PERIOD + [(2, 3)] * PERIOD + [(4, 5)] * 2 * PERIOD


def test_cyclic_goes_round():
    steps = trained("cyclic", 2 / 3, 6, 5 * PERIOD)
    assert steps == [group for group in ((0, 1), (2, 3), (4, 5), (0, 1), (2, 3)) for _ in range(PERIOD)]


def test_the_last_group_is_as_large_as_all_and_overlaps():
    """Seven layers, three trained: the budget of layers holds in each step, and none is left out."""
    assert layer_groups(7, size=3) == [range(3), range(3, 6), range(4, 7)]
    assert trained("cyclic", 4 / 7, 7, 4 * PERIOD)[::PERIOD] == [(0, 1, 2), (3, 4, 5), (4, 5, 6), (0, 1, 2)]
    for num_layers in DEPTHS:
        for size in range(1, num_layers + 1):
            found = layer_groups(num_layers, size=size)
            assert {len(group) for group in found} == {size}
            assert sorted(set().union(*found)) == list(range(num_layers))
            assert len(found) == math.ceil(num_layers / size)


@pytest.mark.parametrize("num_layers", DEPTHS)
@pytest.mark.parametrize("drop", [0.25, 0.5, 0.94])
def test_successive_never_returns_to_what_lies_below(num_layers, drop):
    lowest = [min(layers) for layers in trained("successive", drop, num_layers, 30 * PERIOD)]
    assert lowest == sorted(lowest)
    assert lowest[-1] == num_layers - num_kept(num_layers, drop=drop)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_layers", DEPTHS)
def test_rates_have_the_mean_and_stay_below_the_clamp(shape, num_layers):
    for drop in (0.0, 0.1, 0.5, 0.9):
        rates = drop_rates(num_layers, drop=drop, shape=shape)
        assert rates.mean() == pytest.approx(drop, abs=1e-9)
        assert rates.max() <= RATE_MAX
    assert drop_rates(num_layers, drop=0.99, shape=shape) == pytest.approx([RATE_MAX] * num_layers)


def test_rates_follow_their_shape():
    assert drop_rates(4, drop=0.5, shape="incremental") == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert drop_rates(4, drop=0.5, shape="decay") == pytest.approx([0.8, 0.6, 0.4, 0.2])
    normal = drop_rates(5, drop=0.3, shape="normal")
    assert normal[2] == max(normal)
    assert normal == pytest.approx(normal[::-1])


def test_at_least_one_layer_is_kept():
    assert [num_kept(n, drop=0.99) for n in DEPTHS] == [1, 1, 1, 1]


@pytest.mark.parametrize("drop", [-0.1, 1.0, 1.5, math.nan, math.inf])
@pytest.mark.parametrize("name", POLICIES)
def test_a_drop_outside_its_range_is_refused(name, drop):
    with pytest.raises(ConfigError, match="drop must be at least 0 and below 1"):
        make_policy(spec(name, drop), 6)


def test_wrong_choices_are_refused_with_the_right_ones():
    with pytest.raises(UnknownName, match="no policy 'half'; have: bernoulli, "):
        make_policy(PolicySpec(name="half"), 6)
    with pytest.raises(UnknownName, match="no depth shape 'flat'; have: decay"):
        make_policy(spec("bernoulli", 0.5, "flat"), 6)
    with pytest.raises(ConfigError, match="0 layers"):
        make_policy(PolicySpec(), 0)


@pytest.mark.parametrize("name", ["successive", "cyclic"])
@pytest.mark.parametrize(
    ("period", "said"),
    [
        (0, "needs a period of at least 1 step, got 0"),
        (-1, "period must be at least 0, got -1"),
    ],
)
def test_a_group_is_trained_for_one_step_at_least(name, period, said):
    with pytest.raises(ConfigError, match=f"'{name}':? {said}"):
        make_policy(PolicySpec(name=name, drop=0.5, period=period), 6)


def test_everything_without_use_is_listed():
    with pytest.raises(
        ConfigError, match=r"'full' has no use for drop, got 0\.5; .*; period, got 5; policies that"
    ):
        make_policy(PolicySpec(drop=0.5, period=5), 6)


@pytest.mark.parametrize("num_layers", [2, 6, 7, 24, 129])
def test_the_normal_shape_is_a_bell_within_rounding(num_layers):
    x = (np.arange(num_layers) - (num_layers - 1) / 2) / (num_layers / 6)
    np.testing.assert_allclose(SHAPES["normal"](num_layers), np.exp(-x * x / 2), rtol=1e-14)
