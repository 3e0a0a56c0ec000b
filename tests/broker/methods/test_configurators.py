import msgspec
import pytest
from paths import ROOT
from rounds_by_hand import job

from fleetune.broker.methods.configurators import CONFIGURATORS, OF_RANK, Candidate, fixed
from fleetune.broker.tasks import Outcome, arm_name, listed
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec

CANDIDATES = [Candidate(device, number, i) for number in (1, 2) for i, device in enumerate("abc")]


@pytest.mark.parametrize("name", CONFIGURATORS)
def test_law_the_same_past_makes_the_same_choice(name):
    def chosen():
        configurator = CONFIGURATORS[name]()
        state = configurator.init(job(seed=3, num_layers=6, work=LocalWork(rank=8 * (name in OF_RANK))))
        choices = []
        for candidate in CANDIDATES:
            choices.append(configurator.choose(state, candidate))
            state = configurator.learn(state, Outcome(candidate.device_id, choices[-1].work, {"loss": 1.0}))
        return choices

    assert chosen() == chosen()
    assert len({choice.work.seed for choice in chosen()}) == len(CANDIDATES), "a seed for each"


@pytest.mark.parametrize("name", CONFIGURATORS)
def test_law_to_choose_twice_is_to_choose_the_same(name):
    configurator = CONFIGURATORS[name]()
    state = configurator.init(job(seed=3, num_layers=6, work=LocalWork(rank=8 * (name in OF_RANK))))
    assert configurator.choose(state, CANDIDATES[0]) == configurator.choose(state, CANDIDATES[0])


@pytest.mark.parametrize("name", CONFIGURATORS)
def test_law_all_but_the_policy_is_the_job_s_own_and_no_rank_is_above_it(name):
    work = LocalWork(steps=7, codec="int8", held_out=0.2, rank=8 * (name in OF_RANK))
    configurator, settings = CONFIGURATORS[name](), job(work=work, num_layers=6, rounds=9)
    for candidate in CANDIDATES:
        chosen = configurator.choose(configurator.init(settings), candidate).work
        assert chosen.rank == work.rank or (name in OF_RANK and 0 < chosen.rank < work.rank)
        assert chosen.held_out in (0.0, work.held_out)
        own = {"policy": PolicySpec(), "seed": 0, "rounds_before": 0, "cache_below": -1, "rank": work.rank}
        own |= {"held_out": work.held_out}
        assert msgspec.structs.replace(chosen, **own) == work


def test_fixed_gives_all_the_job_s_own_work():
    settings, configurator = job(work=LocalWork(steps=7, codec="int8")), fixed()
    choices = [configurator.choose(configurator.init(settings), candidate) for candidate in CANDIDATES]
    assert {(choice.work.steps, choice.work.codec, choice.reason) for choice in choices} == {(7, "int8", "")}
    assert [choice.work.rounds_before for choice in choices] == [0, 0, 0, 1, 1, 1]


def test_a_line_of_the_log_names_a_few_of_many():
    assert listed(["a", "b"]) == "a, b"
    assert listed([f"d{i}" for i in range(10_000)]).endswith("d14, d15 and 9984 more")


def test_every_configurator_is_told_of_in_the_docs():
    told = (ROOT / "docs" / "operate.md").read_text()
    assert [name for name in CONFIGURATORS if f"`{name}`" not in told] == []


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        (PolicySpec(), "full"),
        (PolicySpec(name="suffix", drop=11 / 12), "suffix 0.917"),
        (PolicySpec(name="exact-k", drop=0.25, shape="decay"), "exact-k 0.25 decay"),
        (PolicySpec(name="cyclic", drop=0.5, period=4), "cyclic 0.5 period 4"),
    ],
)
def test_a_policy_is_named_with_what_it_is_set_to(policy, name):
    assert arm_name(policy) == name
