"""The baselines' choices, by hand: 12 layers, devices a, b and c."""

import math
from collections import Counter
from typing import NamedTuple

import msgspec
import pytest
from layered_job import deep_job

from fleetune.broker.methods import slt
from fleetune.broker.methods.configurators import CONFIGURATORS, Candidate
from fleetune.broker.methods.controls import halved
from fleetune.broker.methods.depths import block, depth_of, suffix
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.plans import trained_layers
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import make_policy


class Declined(NamedTuple):
    """A task that a device declined, as a configurator hears of it."""

    device_id: str
    work: LocalWork
    stats: dict
    declined: str


class Game:
    """A job by hand: asks a configurator, and tells it what came."""

    def __init__(self, name, **changes):
        self.configurator = CONFIGURATORS[name]()
        self.state = self.configurator.init(deep_job(**changes))

    def choose(self, device="a", number=1, position=0):
        return self.configurator.choose(self.state, Candidate(device, number, position))

    def depth(self, *rest, **named):
        return depth_of(self.choose(*rest, **named).work.policy, 12)

    def tell(self, outcome):
        self.state = self.configurator.learn(self.state, outcome)

    def play(self, device="a", number=1, position=0, **stats):
        work = self.choose(device, number, position).work
        self.tell(Outcome(device, work, stats))
        return work


def trained(work):
    return trained_layers(make_policy(work.policy, 12)(0, Draws(0, "plans", 0), {}))


@pytest.mark.parametrize("num_layers", [1, 2, 6, 12, 24, 97])
def test_a_suffix_of_every_depth_trains_so_many_layers(num_layers):
    for depth in range(1, num_layers + 1):
        policy = suffix(depth, num_layers)
        plan = make_policy(policy, num_layers)(0, Draws(0, "plans", 0), {})
        assert trained_layers(plan) == tuple(range(num_layers - depth, num_layers))
        assert depth_of(policy, num_layers) == depth


def test_a_job_that_does_not_say_how_deep_its_model_is_is_told():
    with pytest.raises(
        ConfigError, match="configurator 'caff': the job does not say how many layers there are"
    ):
        Game("caff", configurator="caff", num_layers=0).choose()


def test_caff_begins_with_a_quarter_of_the_layers():
    game = Game("caff")
    assert [game.depth(device) for device in "abc"] == [3, 3, 3]
    assert "nothing known" in game.choose().reason


def test_caff_lets_the_middle_device_train_all_and_slower_ones_what_they_do_in_that_time():
    """3 of 12 layers are 18 forward: paces 1, 1 and 2 s a layer. In 36 s the slow one runs 12 and trains (18 - 12) / 2 = 3."""
    game = Game("caff")
    for device, seconds in (("a", 18.0), ("b", 18.0), ("c", 36.0)):
        game.play(device, seconds=seconds)
    assert [game.depth(device, 2) for device in "abc"] == [12, 12, 3]
    game.play("c", 2, seconds=1.5 * 18)
    assert game.depth("c", 3) == 6, "now 1.5 s a layer: (24 - 12) / 2"
    assert game.choose("c", 3).reason == "6 of 12 layers: what it does in 36 s"
    assert game.depth("new", 3) == 3


def test_caff_keeps_one_layer_for_the_slowest_and_all_for_the_quickest():
    game = Game("caff")
    for device, seconds in (("a", 18.0), ("b", 18.0), ("c", 1e6), ("d", 0.1)):
        game.play(device, seconds=seconds)
    assert [game.depth(device, 2) for device in "cd"] == [1, 12]
    assert "what it does in" in game.choose("d", 2).reason


def test_caff_goes_below_what_a_device_had_no_memory_for():
    game = Game("caff")
    for device in "abc":
        game.play(device, seconds=18.0)
    for expected in (11, 10):
        game.tell(Declined("a", game.choose("a", 2).work, {}, "memory"))
        assert game.depth("a", 3) == expected
    assert game.depth("b", 3) == 12
    assert "fits its memory" in game.choose("a", 3).reason
    game.tell(Declined("b", game.choose("b", 3).work, {}, "work"))
    assert game.depth("b", 4) == 12


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e300, 5e-324])
def test_caff_believes_no_nonsense(seconds):
    game = Game("caff")
    game.play("a", seconds=18.0)
    game.play("b", seconds=seconds)
    game.play("c")
    assert [game.depth(device, 2) for device in "abc"] == [12, 3, 3]


def test_a_liar_moves_nobody_but_itself_in_caff():
    game = Game("caff")
    for device, seconds in (("a", 18.0), ("b", 18.0), ("c", 18.0), ("liar", 1e-6)):
        game.play(device, seconds=seconds)
    assert [game.depth(device, 2) for device in ("a", "b", "c", "liar")] == [12, 12, 12, 12]


def test_stages_of_slt_share_the_rounds_and_go_up():
    """24 rounds: two for each layer; 6 rounds: groups of two; 5 rounds: four groups of three; one round: all."""
    firsts = {n: [slt.stage(deep_job(rounds=n), r)[1:] for r in range(1, n + 1)] for n in (24, 6, 5, 1)}
    assert firsts[24] == [(layer, 1) for layer in range(12) for _ in range(2)]
    assert firsts[6] == [(layer, 2) for layer in range(0, 12, 2)]
    assert firsts[5] == [(0, 3), (0, 3), (3, 3), (6, 3), (9, 3)]
    assert firsts[1] == [(0, 12)]
    assert [slt.stage(deep_job(rounds=3, num_layers=7), r)[1:] for r in (1, 2, 3)] == [(0, 3), (3, 3), (6, 1)]


def test_slt_trains_the_group_of_the_round_and_keeps_what_flows_into_it():
    game = Game("slt", rounds=6)
    works = [game.choose(device, 2, i).work for i, device in enumerate("abc")]
    assert {trained(work) for work in works} == {(2, 3)}
    assert {work.cache_below for work in works} == {2}
    assert game.choose("a", 6).reason == "stage 6 of 6: layers 10 to 11"


def test_fedcybgd_moves_each_place_on_by_one_layer_a_round():
    game = Game("fedcybgd", rounds=20)
    assert [trained(game.choose("a", 1, i).work) for i in (0, 1, 11, 12)] == [(0,), (1,), (11,), (0,)]
    assert [trained(game.choose("a", r, 3).work) for r in (1, 2, 10)] == [(3,), (4,), (0,)]
    assert game.choose("a", 2, 3).reason == "layer 4, its turn"
    assert block(4, 1).name == "block"


def a_trial(game, gains, *, first=1, seconds=10.0):
    """Three rounds of three devices; ``gains`` of accuracy by depth and rank."""
    for number in range(first, first + 3):
        for position, device in enumerate("abc"):
            work = game.choose(device, number, position).work
            key = (depth_of(work.policy, 12), work.rank)
            game.play(
                device,
                number,
                position,
                held_accuracy_before=0.5,
                held_accuracy_after=0.5 + gains[key],
                seconds=seconds,
            )


def test_fedadapter_begins_with_one_layer_and_tries_a_deeper_suffix_by_turns():
    game = Game("fedadapter")
    rounds = [[game.depth(device, number, i) for i, device in enumerate("abcd")] for number in (1, 2, 3)]
    assert rounds == [[3, 1, 3, 1], [1, 3, 1, 3], [3, 1, 3, 1]]
    assert game.choose("a", 1, 0).reason == "deep: 3 of 12 layers"


def test_fedadapter_inherits_the_depth_that_gains_more_in_its_time():
    game = Game("fedadapter")
    a_trial(game, {(1, 0): 0.01, (3, 0): 0.05})
    assert {game.depth("a", 4, i) for i in range(2)} == {3, 5}
    a_trial(game, {(3, 0): 0.05, (5, 0): 0.01}, first=4)
    assert {game.depth("a", 7, i) for i in range(2)} == {3, 5}, "no deeper, and 5 is tried again"
    a_trial(game, {(3, 0): 0.01, (5, 0): 0.05}, first=7)
    assert {game.depth("a", 10, i) for i in range(2)} == {5, 7}


def test_fedadapter_stays_where_groups_are_equal_or_nothing_is_told():
    game = Game("fedadapter")
    a_trial(game, {(1, 0): 0.01, (3, 0): 0.01})
    assert {game.depth("a", 4, i) for i in range(2)} == {1, 3}
    assert {game.depth("a", 40, i) for i in range(2)} == {1, 3}


def test_fedadapter_compares_gains_per_second_and_falls_back_to_the_training_loss():
    game = Game("fedadapter")
    for position in (0, 1, 2, 3):
        deep = game.depth("a", 1, position) == 3
        game.play("a", 1, position, loss_first=2.0, loss=1.8 - 0.2 * deep, seconds=30.0 if deep else 10.0)
    assert {game.depth("a", 4, i) for i in range(2)} == {1, 3}, "0.4 in 30 s is less than 0.2 in 10 s"


def test_fedadapter_widens_by_the_rank_up_to_the_job_s():
    game = Game("fedadapter", work=LocalWork(rank=8), strategy="hetlora")
    tried = {(depth_of((work := game.choose("a", 1, i).work).policy, 12), work.rank) for i in range(3)}
    assert tried == {(1, 2), (3, 2), (1, 4)}
    for first, gains in ((1, (1, 4)), (4, (1, 8))):
        a_trial(
            game, {**dict.fromkeys([(1, 2), (3, 2), (1, 4), (3, 4), (1, 8)], 0.0), gains: 0.1}, first=first
        )
    assert {game.choose("a", 7, i).work.rank for i in range(3)} == {8}, (
        "the artifact's own rank is the widest"
    )


@pytest.mark.parametrize(
    "stats",
    [
        {"held_accuracy_before": 0.0, "held_accuracy_after": math.nan, "seconds": 1.0},
        {"held_accuracy_before": 0.0, "held_accuracy_after": FIGURE_MAX, "seconds": 1.0},
        {"held_accuracy_before": 0.0, "held_accuracy_after": 1.0, "seconds": -1.0},
        {"held_accuracy_before": 0.0, "held_accuracy_after": 1.0, "seconds": math.nan},
    ],
)
def test_one_device_s_nonsense_does_not_decide_a_trial_of_fedadapter(stats):
    game = Game("fedadapter")
    a_trial(game, {(1, 0): 0.05, (3, 0): 0.01})
    game.play("liar", 3, 0, **stats)
    assert {game.depth("a", 4, i) for i in range(2)} == {1, 3}


def test_a_random_depth_is_any_depth_and_the_same_again():
    game, again = Game("random-depth", seed=3), Game("random-depth", seed=3)
    depths = [game.depth("a", number, i) for number in range(1, 41) for i in range(12)]
    assert depths == [again.depth("a", number, i) for number in range(1, 41) for i in range(12)]
    assert set(depths) == set(range(1, 13))
    assert max(Counter(depths).values()) < 3 * min(Counter(depths).values())
    assert depths != [Game("random-depth", seed=4).depth("a", n, i) for n in range(1, 41) for i in range(12)]


def test_a_device_keeps_its_rank_for_good():
    game = Game("ranks", seed=3, work=LocalWork(rank=8))
    first = {f"device-{i}": game.choose(f"device-{i}", 1, i).work.rank for i in range(40)}
    assert first == {device: game.choose(device, 7, 0).work.rank for device in first}
    assert set(first.values()) == {8, 4, 2, 1}
    assert [halved(rank) for rank in (1, 2, 6, 16)] == [[1], [2, 1], [6, 3, 1], [16, 8, 4, 2, 1]]


@pytest.mark.parametrize("name", ["caff", "fedadapter", "random-depth", "ranks"])
def test_all_else_of_the_job_s_work_stays(name):
    work = LocalWork(steps=7, codec="int8", rank=4)
    chosen = Game(name, work=work).choose("a", 3, 1).work
    mine = {"policy": work.policy, "rank": 4, "seed": 0, "rounds_before": 0}
    assert msgspec.structs.replace(chosen, **mine) == work
    assert chosen.rounds_before == 2
