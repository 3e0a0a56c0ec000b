import pytest
from layered_job import deep_job, needs_blocks
from paths import ROOT
from rounds_by_hand import job

from fleetune.broker.methods.configurators import CONFIGURATORS, OF_RANK, Candidate, fixed
from fleetune.broker.tasks import Outcome, listed
from fleetune.device_runtime.contracts.wire import LocalWork

CANDIDATES = [Candidate(device, number, i) for number in (1, 2) for i, device in enumerate("abc")]


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_blocks(n)) for n in CONFIGURATORS])
def test_law_the_same_past_makes_the_same_choice(name):
    def chosen():
        configurator = CONFIGURATORS[name]()
        state = configurator.init(deep_job(seed=3, work=LocalWork(rank=8 * (name in OF_RANK))))
        works = []
        for candidate in CANDIDATES:
            works.append(configurator.choose(state, candidate).work)
            state = configurator.learn(state, Outcome(candidate.device_id, works[-1], {"loss": 1.0}))
        return works

    assert chosen() == chosen()
    assert len({work.seed for work in chosen()}) == len(CANDIDATES), "a seed for each"


def test_fixed_gives_all_the_job_s_own_work():
    settings, configurator = job(work=LocalWork(steps=7, codec="int8")), fixed()
    works = [configurator.choose(configurator.init(settings), candidate).work for candidate in CANDIDATES]
    assert {(work.steps, work.codec) for work in works} == {(7, "int8")}
    assert [work.rounds_before for work in works] == [0, 0, 0, 1, 1, 1]


def test_a_line_of_the_log_names_a_few_of_many():
    assert listed(["a", "b"]) == "a, b"
    assert listed([f"d{i}" for i in range(10_000)]).endswith("d14, d15 and 9984 more")


def test_every_configurator_is_told_of_in_the_docs():
    told = (ROOT / "docs" / "operate.md").read_text()
    assert [name for name in CONFIGURATORS if f"`{name}`" not in told] == []
