"""The bandit in a fleet without training: what it costs against the best fixed arm, and whom nonsense steers."""

from statistics import mean

import msgspec
import numpy as np
import pytest
from bandit_world import Curve, World

from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.arms import FULL_DEPTH, arm_of, first_arms, needs_as_much, neighbours
from fleetune.broker.methods.auto import Tuning, auto, is_tail
from fleetune.broker.methods.choosing import Candidate
from fleetune.broker.tasks import REASON_CHARS_MAX, Outcome, arm_name
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec

SEEDS = range(20)


def equal(policy, back):
    """Any depth learns the same."""
    return Curve(0.15, 0.85)


def deep(policy, back):
    """Few layers learn quickly, and end far below: the trap of a head's first gains."""
    return (
        Curve(0.3 - 0.15 * back, 0.45 + 0.162 * back**0.4)
        if policy.name in ("full", "suffix")
        else Curve(0.15, 0.56)
    )


def shallow(policy, back):
    """The fewer layers the better."""
    return Curve(0.2, 0.89 - 0.025 * back) if policy.name in ("full", "suffix") else Curve(0.15, 0.8)


def world(curve, seed, *, devices=8, **changes):
    speeds = np.exp(np.random.default_rng(seed).uniform(0, 1.8, devices))
    return World(curve, speeds=speeds.tolist(), seed=seed, **changes)


def regrets(curve, **changes):
    """(quality below the best fixed arm, time as a share of full depth's) of each seed."""
    found = []
    for seed in SEEDS:
        made = world(curve, seed)
        ended = made.under(auto(), **changes)
        fixed = [made.always(arm.policy).quality for arm in first_arms(made.settings())]
        found.append((max(fixed) - ended.quality, ended.seconds / made.always(FULL_DEPTH).seconds))
    return np.array(found).T


@pytest.mark.parametrize("explore", ["epsilon", "ucb"])
@pytest.mark.parametrize("curve", [equal, deep, shallow])
def test_it_ends_a_point_below_the_best_fixed_arm_at_most_and_takes_no_longer_than_full_depth(curve, explore):
    lost, time = regrets(curve, explore=explore)
    assert lost.mean() <= 0.01
    assert np.sort(lost)[-2] <= 0.02, "one seed of twenty may be unlucky"
    assert time.max() <= 1.0


def test_where_less_is_as_good_always_full_depth_is_beaten_in_time():
    lost, time = regrets(equal)
    assert lost.max() < 0.001
    assert time.mean() < 0.85


def test_in_a_job_too_short_to_learn_from_each_device_trains_the_deepest_in_its_time_and_holds_nothing_back():
    made = world(equal, 3, rounds=20)  # of eight devices
    configurator, settings = auto(), made.settings()
    state = configurator.init(settings)
    for number in range(1, 21):
        for i, speed in enumerate(made.speeds):
            choice = configurator.choose(state, Candidate(f"d{i}", number, i))
            assert choice.work.held_out == 0
            assert choice.work.cache_below == (9 if number <= 4 else -1)
            assert choice.reason == "the deepest in its time: the job is too short to try others"
            stats = {"seconds": speed * made.cost(choice.work.policy, max(choice.work.cache_below, 0))}
            state = configurator.learn(state, Outcome(f"d{i}", choice.work, stats))
    middle, full = np.median(made.speeds), made.cost(FULL_DEPTH)
    for i, speed in enumerate(made.speeds):
        policy = configurator.choose(state, Candidate(f"d{i}", 20, i)).work.policy
        assert policy.name in ("full", "suffix")
        assert speed * made.cost(policy) <= 1.25 * Tuning().patience * middle * full
    assert configurator.prepare(state, LocalWork(held_out=0.1)).held_out == 0


def test_a_fast_device_is_asked_for_more_than_a_slow_one():
    made = World(lambda policy, back: Curve(0.03 + 0.06 * back, 0.85), speeds=[1.0] * 4 + [6.0] * 4, seed=3)
    chosen = made.under(auto()).chosen[6:26]

    def depth(devices):
        return mean(arm_of(arms[i], 12).back for arms in chosen for i in devices)

    assert depth(range(4)) > depth(range(4, 8)) + 1


AFTER_STAGES = 22


def first_round(count, **changes):
    made = world(equal, 0)
    settings = made.settings(**changes)
    configurator = auto()
    state = configurator.init(settings)
    return [configurator.choose(state, Candidate(f"d{i}", AFTER_STAGES, i)) for i in range(count)], settings


def test_the_fleet_tries_each_arm_once_before_one_a_second_time():
    arms = first_arms(world(equal, 0).settings())
    choices, settings = first_round(2 * len(arms))
    assert {c.work.policy for c in choices[1::2]} == {arm.policy for arm in arms}
    assert {c.reason for c in choices[1::2]} == {"warm-up: the fleet has not tried it"}
    assert [c.work.seed for c in choices] == [
        device_work(settings, round_number=AFTER_STAGES, position=i).seed for i in range(len(choices))
    ]


def test_arms_follow_from_the_number_of_layers_and_full_depth_is_among_them():
    names = [arm.name for arm in first_arms(world(equal, 0).settings())]
    assert names[0] == "full"
    assert {"suffix 0.25", "suffix 0.5", "suffix 0.75", "suffix 0.917"} <= set(names)
    assert len(names) == len(set(names)) <= Tuning().arms_max
    assert [arm.name for arm in first_arms(world(equal, 0, num_layers=1).settings())] == ["full"]
    assert [arm.name for arm in first_arms(world(equal, 0).settings(num_layers=0))] == ["full"]


def test_the_job_s_own_policy_is_an_arm():
    settings = world(equal, 0).settings()
    own = PolicySpec(name="cyclic", drop=0.5, period=3)
    work = msgspec.structs.replace(settings.work, policy=own)
    assert own in [arm.policy for arm in first_arms(msgspec.structs.replace(settings, work=work))]


def test_neighbours_are_one_layer_away():
    half = arm_of(PolicySpec(name="suffix", drop=0.5), 12)
    assert sorted(arm.back for arm in neighbours(half, 12)) == [5, 7]
    assert [arm.back for arm in neighbours(arm_of(FULL_DEPTH, 12), 12)] == [11]
    assert [arm.back for arm in neighbours(arm_of(PolicySpec(name="suffix", drop=11 / 12), 12), 12)] == [2]
    assert neighbours(arm_of(FULL_DEPTH, 1), 1) == ()


def test_neighbours_of_a_steady_favourite_are_tried_and_arms_stay_few():
    made = world(equal, 1, rounds=60)
    seen = {policy for arms in made.under(auto()).chosen for policy in arms.values()}
    assert seen - {arm.policy for arm in first_arms(made.settings())}
    configurator = auto()
    state = configurator.init(made.settings())
    assert len(state.arms) <= Tuning().arms_max


def refusing(*causes):
    """A state in which device d0 declined every arm deeper than three layers back, for these causes."""
    made = world(equal, 0)
    configurator = auto()
    state = configurator.init(made.settings())
    work = device_work(made.settings(), round_number=1, position=0)
    for policy, cause in causes:
        state = configurator.learn(
            state, Outcome("d0", msgspec.structs.replace(work, policy=policy), {}, cause)
        )
    return configurator, state


HALF = PolicySpec(name="suffix", drop=0.5)


def chosen_by(configurator, state, device="d0"):
    choices = [configurator.choose(state, Candidate(device, n, p)) for n in range(1, 20) for p in range(8)]
    return {choice.work and choice.work.policy for choice in choices}


def test_what_was_declined_for_memory_rules_out_all_that_needs_as_much():
    configurator, state = refusing((HALF, "memory"))
    half = arm_of(HALF, 12)
    chosen = chosen_by(configurator, state)
    assert chosen
    assert not any(needs_as_much(arm_of(policy, 12), half) for policy in chosen)
    assert FULL_DEPTH in chosen_by(configurator, state, "d1"), "another device is not meant"


def test_what_could_not_be_done_rules_out_itself_and_a_pause_nothing():
    assert HALF not in (chosen := chosen_by(*refusing((HALF, "work"))))
    assert FULL_DEPTH in chosen
    assert HALF in chosen_by(*refusing((HALF, "")))


def test_a_device_that_declined_everything_is_left_out_and_the_least_is_named():
    least = PolicySpec(name="suffix", drop=11 / 12)
    others = [
        (arm.policy, "work") for arm in first_arms(world(equal, 0).settings()) if arm.name.startswith("exact")
    ]
    configurator, state = refusing((FULL_DEPTH, "memory"), (least, "memory"), *others)
    choice = configurator.choose(state, Candidate("d0", 2, 0))
    assert choice.work is None
    assert "suffix 0.917 the least" in choice.reason or others


NONSENSE = [
    {},
    {"seconds": float("nan"), "held_loss_before": float("inf"), "held_loss_after": 1.0},
    {"seconds": 0.0, "held_loss_before": 1e300, "held_loss_after": 0.0},
    {"seconds": -1.0, "held_loss_before": -5.0, "held_loss_after": -1e300},
    {"seconds": 1e300, "held_loss_before": 1e3, "held_loss_after": 0.0},
    {"seconds": 1e-300, "held_loss_before": 0.0, "held_loss_after": 1e3},
]


@pytest.mark.parametrize("stats", NONSENSE)
def test_a_fleet_that_tells_nonsense_crashes_nothing(stats):
    ended = world(equal, 0, rounds=12).under(auto(), lie=lambda i, _: stats)
    assert len(ended.chosen) == 12


def test_without_a_figure_everyone_ends_as_deep_as_its_time_allows():
    made = world(equal, 0, rounds=30)
    ended = made.under(auto(), lie=lambda i, stats: {"seconds": stats["seconds"]})
    limit = Tuning().patience * float(np.median(made.speeds))
    for i, speed in enumerate(made.speeds):
        assert ended.chosen[-1][i] == FULL_DEPTH or speed > 0.9 * limit, i
        assert ended.chosen[-1][i] != FULL_DEPTH or speed < 1.2 * limit, i
    told_nothing = made.under(auto(), lie=lambda i, stats: {})
    assert set(told_nothing.chosen[-1].values()) == {FULL_DEPTH}


def test_where_the_upper_half_gains_as_much_nothing_below_it_learns_but_in_pilots():
    """So that what flows into the lowest layer that learns can be kept from round to round on every device."""
    made, lowest = world(equal, 0), []
    configurator, settings = auto(), world(equal, 0).settings()
    state = configurator.init(settings)
    for number in range(1, 41):
        works = [configurator.choose(state, Candidate(f"d{i}", number, i)).work for i in range(8)]
        assert len({work.cache_below for work in works}) == 1
        floor = max(works[0].cache_below, 0)
        assert all(made.arm(work.policy).lowest >= floor for work in works)
        lowest.append(floor)
        for i, work in enumerate(works):
            stats = {
                "held_loss_before": 2.0,
                "held_loss_after": 1.9,
                "seconds": made.cost(work.policy, floor),
            }
            state = configurator.learn(state, Outcome(f"d{i}", work, stats))
    all_learn = [number for number, floor in enumerate(lowest[:28], 1) if floor == 0]
    assert all_learn[0] == 8, "the first pilot"
    assert 16 in all_learn
    assert [number for number in all_learn if number > 16] == [24]


def test_a_job_begins_with_the_uppermost_layers_of_the_whole_fleet():
    """And then each device trains what it has time for; in the last rounds nothing is held back for measuring."""
    made = World(deep, speeds=[1.0] * 6 + [6.0] * 2)
    ended, configurator = made.under(auto()), auto()
    depths = [[made.arm(policy).back for policy in arms.values()] for arms in ended.chosen]
    assert {depth for asked in depths[1:7] for depth in asked} <= {1, 2, 3}
    assert max(depths[10]) == 12
    state = configurator.init(made.settings(head_start="class-mean"))
    assert configurator.prepare(state, LocalWork(held_out=0.1)).cache_below == 9, (
        "kept with the sums for the head"
    )


def test_where_the_upper_half_gains_too_little_all_layers_learn_before_the_last_rounds():
    made = World(lambda policy, back: Curve(0.2 * back**3, 0.9), speeds=[1.0] * 8, noise=0.005)
    chosen = made.under(auto()).chosen[15:24]
    assert mean(made.arm(policy).back for arms in chosen for policy in arms.values()) > 6.5


def lies():
    def praises_the_least(i, stats):
        return stats | {"held_loss_after": 0.0} if i == 0 else stats

    def is_ten_times_faster(i, stats):
        return stats | {"seconds": stats["seconds"] / 10} if i == 0 else stats

    def tells_anything(i, stats):
        return NONSENSE[int(1e6 * stats["seconds"]) % len(NONSENSE)] if i == 0 else stats

    return [praises_the_least, is_ten_times_faster, tells_anything]


@pytest.mark.parametrize("lie", lies(), ids=lambda lie: lie.__name__)
def test_one_device_that_lies_does_not_steer_the_others(lie):
    lost, time = [], []
    for seed in range(8):
        made = world(deep, seed)
        ended, honest = made.under(auto(), lie=lie), made.under(auto())
        lost.append(honest.quality - ended.quality)
        time.append(ended.seconds / made.always(FULL_DEPTH).seconds)
    assert mean(lost) < 0.01
    assert mean(time) < 1.0
    assert max(time) <= 1.0


def test_every_choice_says_why_in_a_printable_line():
    made = world(deep, 2)
    configurator, settings = auto(), made.settings()
    state, reasons = configurator.init(settings), set()
    for number in range(1, 41):
        for i in range(6):
            choice = configurator.choose(state, Candidate(f"d{i}", number, i))
            reasons.add(choice.reason)
            stats = {"held_loss_before": 2.0, "held_loss_after": 1.9 - 0.01 * i, "seconds": 1.0 + i}
            state = configurator.learn(state, Outcome(f"d{i}", choice.work, stats))
    assert all(reason and reason.isprintable() and len(reason) <= REASON_CHARS_MAX for reason in reasons)
    assert {reason.partition(":")[0].partition(",")[0] for reason in reasons} == {
        "warm-up", "explores", "pilot", "the deepest in its time", "most for its time", "last rounds",
    }  # fmt: skip
    assert is_tail(state, 40)


def test_arms_have_names_of_their_own():
    names = [arm_name(arm.policy) for arm in first_arms(world(equal, 0).settings())]
    assert len(set(names)) == len(names)


def test_the_pass_for_the_head_tells_who_is_slow_before_anyone_has_trained():
    made, configurator = world(equal, 0, devices=4), auto()
    settings = made.settings(head_start="class-mean", explore="ucb")
    state = configurator.init(settings)
    for i, seconds in enumerate((1.0, 1.0, 1.0, 8.0)):
        work = LocalWork(learns="class-means")
        state = configurator.learn(state, Outcome(f"d{i}", work, {"seconds": seconds, "samples": 100.0}))
    depth = [
        made.arm(configurator.choose(state, Candidate(f"d{i}", 2, 0)).work.policy).back for i in range(4)
    ]
    assert depth[:3] == [3, 3, 3]
    assert depth[3] < 3


@pytest.mark.parametrize("stats", [{}, {"seconds": float("nan"), "samples": 1.0}, {"seconds": 1.0, "samples": 0.0},
                                   {"seconds": 1e300, "samples": 1e300}, {"seconds": -1.0, "samples": -1.0}])  # fmt: skip
def test_a_pass_that_tells_nonsense_tells_nothing(stats):
    configurator = auto()
    state = configurator.init(world(equal, 0).settings())
    state = configurator.learn(state, Outcome("d0", LocalWork(learns="class-means"), stats))
    assert not state.pass_s
