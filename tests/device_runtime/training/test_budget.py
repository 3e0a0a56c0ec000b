"""A budget picks the quickest memory plan that fits, and says what would fit where none does."""

import re

import pytest
from pretrained import minilm_artifact

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.engine.footprint import BARE_BYTES, footprint
from fleetune.device_runtime.errors import ConfigError, TooLittleMemory
from fleetune.device_runtime.training.budget import MARGIN, expected_mb, fit, resident_mb

PLENTY = 10_000
WHOLE = MemoryPlan(micro_batch=16)
EXACT, BERNOULLI = PolicySpec(name="exact-k", drop=0.5), PolicySpec(name="bernoulli", drop=0.5)


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(minilm_artifact(77), verify=False)


def fitted(artifact, budget_mb, policy=None, **more):
    work = LocalWork(batch_size=16, policy=policy or PolicySpec())
    return fit(artifact, work, num_tokens=64, budget_mb=budget_mb, **more)


def least(artifact, policy=None):
    with pytest.raises(ConfigError, match="the least that would do is") as refused:
        fitted(artifact, 1, policy)
    return float(re.search(r"least that would do is (\d+) MB", str(refused.value))[1])


def peak_mb(artifact, dropped=(), memory=SAVE_ALL):
    sizes = {"batch_size": 16, "seq_len": 64}
    found = footprint(artifact, dropping(6, dropped), memory=memory, also_read=range(6), **sizes)
    return MARGIN * found.peak / 1e6


def test_lanes_at_different_layers_hold_the_weights_of_both(artifact):
    streamed = MemoryPlan(micro_batch=2, saved_layers=0, streamed=True)
    sizes = {"batch_size": 16, "seq_len": 64, "memory": streamed}
    one, two, many = (footprint(artifact, dropping(6, ()), **sizes, lanes=n) for n in (1, 2, 99))
    resident = footprint(artifact, dropping(6, ()), **(sizes | {"memory": streamed._replace(streamed=False)}))
    assert two.weights == 2 * one.weights
    assert two.peak - one.peak == one.weights
    assert many.weights <= resident.weights + one.weights
    found = fitted(
        artifact, least(artifact) + 20, count_lanes=lambda memory: 99 if memory.micro_batch > 1 else 1
    )
    assert found.memory.micro_batch == 1


def test_the_weights_of_all_layers_count_that_a_policy_ever_runs(artifact):
    """exact-k runs three of six in a step, and in some step each of them."""
    alone = footprint(artifact, dropping(6, (1, 3, 5)), batch_size=16, seq_len=64).peak / 1e6
    found = fitted(artifact, PLENTY, EXACT)
    assert found.expected_mb == pytest.approx(peak_mb(artifact, (1, 3, 5)))
    assert found.expected_mb > MARGIN * alone + 1


def test_with_plenty_everything_is_kept(artifact):
    found = fitted(artifact, PLENTY)
    assert (found.memory, found.active_layers, found.drop) == (WHOLE, 6, 0.0)


def test_with_the_least_everything_is_given_up_and_with_less_it_is_refused(artifact):
    found = fitted(artifact, least(artifact) + 1)
    assert found.memory == MemoryPlan(micro_batch=1, saved_layers=found.memory.saved_layers, streamed=True)
    with pytest.raises(ConfigError, match=r"one row of 64 tokens .* or use policy exact-k"):
        fitted(artifact, least(artifact) - 1)
    by_row = PolicySpec(name="exact-k", drop=0.5, gates="row")
    with pytest.raises(ConfigError, match="or use policy exact-k with gates for batches, which"):
        fitted(artifact, 1, by_row)


def test_what_is_expected_is_within_every_budget_and_never_slower_with_more(artifact):
    low = int(least(artifact)) + 1
    found = [fitted(artifact, budget) for budget in range(low, 420, 12)]
    assert all(f.expected_mb <= budget for f, budget in zip(found, range(low, 420, 12), strict=True))
    rows = [f.memory.micro_batch or 16 for f in found]
    assert rows[0] < rows[-1] == 16
    assert found[-1].memory == WHOLE
    assert len({f.memory for f in found}) > 5


def test_weights_are_streamed_before_activations_are_recomputed(artifact):
    """Streaming costs a few per cent, a recomputed layer a third of its time."""
    assert fitted(artifact, peak_mb(artifact) - 1).memory == WHOLE._replace(streamed=True)


def test_a_policy_counts_with_its_deepest_plan(artifact):
    """exact-k at one half never runs more than three layers; Bernoulli at one half does run all six now and then."""
    half = peak_mb(artifact, (0, 1, 2)) + 0.1
    assert fitted(artifact, half, EXACT).memory == WHOLE
    assert fitted(artifact, half, BERNOULLI).memory != WHOLE


@pytest.mark.parametrize("name", ["successive", "cyclic"])
def test_a_block_that_moves_counts_where_it_lies_lowest(artifact, name):
    """The way back from the lowest block goes through all layers, though one half is trained; suffix trains the upper half."""
    moving, still = PolicySpec(name=name, drop=0.5, period=9), PolicySpec(name="suffix", drop=0.5)
    assert fitted(artifact, peak_mb(artifact) + 0.1, moving).memory == WHOLE
    assert fitted(artifact, peak_mb(artifact) - 1, still).memory == WHOLE
    assert fitted(artifact, peak_mb(artifact) - 1, moving).memory != WHOLE


def test_a_schedule_counts_with_the_steps_at_hand(artifact):
    """Half of the layers falls out at first, none from step 40 on; rounds of ten steps."""
    falling = PolicySpec(name="exact-k", drop=0.5, schedule="falling", horizon=40)

    def layers(rounds_before, num_steps=10, policy=falling):
        work = LocalWork(batch_size=16, policy=policy, rounds_before=rounds_before)
        found = fit(artifact, work, num_tokens=64, budget_mb=PLENTY, num_steps=num_steps)
        return found.active_layers

    assert [layers(n) for n in range(6)] == [4, 4, 5, 6, 6, 6]
    assert layers(0, num_steps=10_000) == 6  # the last of many steps is among those looked at
    assert layers(0, policy=PolicySpec(name="exact-k", drop=0.5, schedule="tail", horizon=10)) == 3
    assert layers(1, policy=PolicySpec(name="exact-k", drop=0.5, schedule="tail", horizon=10)) == 6


@pytest.mark.parametrize(
    ("num_steps", "period", "rounds_before"), [(60_000, 10, 0), (256 * 36 + 1, 6, 8), (10_007, 39, 1)]
)
def test_a_long_run_is_looked_at_everywhere(artifact, num_steps, period, rounds_before):
    """The lowest of six blocks is found; every 36th step of the second run trains the one above."""
    policy = PolicySpec(name="cyclic", drop=0.8, period=period)
    work = LocalWork(batch_size=16, policy=policy, rounds_before=rounds_before)
    found = fit(artifact, work, num_tokens=64, budget_mb=PLENTY, num_steps=num_steps)
    assert found.expected_mb == pytest.approx(peak_mb(artifact))


def test_layers_that_the_gradient_goes_around_keep_nothing(artifact):
    """All run and are read; the way back goes through half of them."""
    bypassing = fitted(artifact, PLENTY, PolicySpec(name="dropbp", drop=0.5))
    assert bypassing.active_layers == 6
    assert peak_mb(artifact, (0, 1, 2)) - 1 < bypassing.expected_mb < peak_mb(artifact) - 1
    bare = fitted(artifact, PLENTY, PolicySpec(name="coto", drop=0.1))
    assert bare.expected_mb == pytest.approx(peak_mb(artifact))


@pytest.mark.parametrize("protected", [2, 3])
def test_what_is_protected_is_not_given_up(artifact, protected):
    policy = PolicySpec(name="exact-k", drop=0.1, protected=protected, protect="effect")
    with pytest.raises(ConfigError, match="the least that would do is"):
        fitted(artifact, 1, policy)
    found = fitted(artifact, least(artifact, policy) + 1, policy)
    assert found.active_layers >= protected


@pytest.mark.parametrize("num_tokens", range(33, 49))
def test_the_least_that_is_said_is_enough(artifact, num_tokens):
    """A number without decimals, never below what was expected."""
    sizes = {"artifact": artifact, "work": LocalWork(batch_size=16), "num_tokens": num_tokens}
    with pytest.raises(TooLittleMemory) as refused:
        fit(**sizes, budget_mb=1)
    said_mb = int(re.search(r"least that would do is (\d+) MB", str(refused.value))[1])
    assert said_mb - 1 < fit(**sizes, budget_mb=said_mb).expected_mb <= said_mb


def test_exact_k_drops_more_only_when_nothing_else_fits(artifact):
    needed = least(artifact, PolicySpec())
    policy = PolicySpec(name="exact-k", drop=0.0)
    assert fitted(artifact, needed + 1, policy).drop == 0.0
    fewer = fitted(artifact, least(artifact, policy) + 1, policy)
    assert fewer.drop >= 0.0
    assert least(artifact, policy) <= needed


def test_what_the_process_holds_already_counts(artifact):
    enough = peak_mb(artifact) + 1
    assert fitted(artifact, enough, resident_mb=20).memory == WHOLE
    assert fitted(artifact, enough, resident_mb=120).memory != WHOLE


def test_a_little_more_or_less_in_the_process_changes_nothing(artifact):
    found = {fitted(artifact, 250, resident_mb=held) for held in (97, 100, 104)}
    assert len(found) == 1


def test_the_footprint_knows_what_each_part_of_a_plan_saves(artifact):
    whole = peak_mb(artifact)
    for memory in (RECOMPUTE, MemoryPlan(4), MemoryPlan(saved_layers=3), MemoryPlan(streamed=True)):
        assert peak_mb(artifact, memory=memory) < whole
    assert peak_mb(artifact, memory=MemoryPlan(100, 100)) == whole


def test_what_is_expected_has_the_margin_on_it(word_artifact):
    """A peak a tenth above its estimate, as was measured, still keeps the budget."""
    tiny = open_artifact(word_artifact)
    peak = footprint(tiny, dropping(4, ()), batch_size=16, seq_len=24).peak / 1e6
    work = LocalWork(batch_size=16)
    found = fit(tiny, work, num_tokens=24, budget_mb=PLENTY)
    assert found.expected_mb == pytest.approx(peak * 9 / 8)
    assert fit(tiny, work, num_tokens=24, budget_mb=peak * 1.13).memory == WHOLE
    smaller = fit(tiny, work, num_tokens=24, budget_mb=peak * 1.12)
    assert smaller.memory != WHOLE
    held = fit(tiny, work, num_tokens=24, budget_mb=PLENTY, resident_mb=BARE_BYTES / 1e6 + 100)
    assert held.expected_mb == pytest.approx((peak + 106) * 9 / 8)


def test_this_process_holds_something():
    assert 20 < resident_mb() < 100_000


BOUNDED = LocalWork(batch_size=16, micro_tokens=256)


def test_a_bound_in_tokens_counts_in_what_fits(artifact):
    plain = fitted(artifact, PLENTY)
    found = fit(artifact, BOUNDED, num_tokens=64, budget_mb=PLENTY)
    assert found.memory == WHOLE._replace(micro_tokens=256)
    assert str(found).startswith("16 rows of at most 256 tokens at a time, all activations kept, ")
    assert found.expected_mb < plain.expected_mb - 50
    budget = found.expected_mb + 1
    assert fit(artifact, BOUNDED, num_tokens=64, budget_mb=budget).memory == found.memory
    assert fitted(artifact, budget).memory.micro_batch < 16
    tighter = fit(artifact, BOUNDED, num_tokens=64, budget_mb=least(artifact) + 1).memory
    assert (tighter.micro_batch, tighter.micro_tokens) == (1, 256)


def test_what_a_bound_in_tokens_is_expected_to_take_is_that_of_four_rows_of_64(artifact):
    plan = MemoryPlan(micro_tokens=256)
    found = expected_mb(artifact, BOUNDED, num_tokens=64, memory=plan)
    four = expected_mb(artifact, BOUNDED, num_tokens=64, memory=MemoryPlan(4))
    assert found == pytest.approx(four)
    assert found < expected_mb(artifact, BOUNDED, num_tokens=64, memory=SAVE_ALL) - 50
