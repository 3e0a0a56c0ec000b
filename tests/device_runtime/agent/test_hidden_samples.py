"""Work that hides samples: what its owner's account allows, once whatever is killed, and nothing told beside the update."""

import math
import sys

import pytest
from fleet import STEPS, workbench_of
from stage import Stage

from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.contracts.accounting import Steps, epsilon_of_steps
from fleetune.device_runtime.contracts.wire import Decline, UpdateReady
from fleetune.device_runtime.contracts.work import CLASS_MEANS, LocalWork
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.terms.account import FILE, Account
from fleetune.device_runtime.terms.contract import Contract
from fleetune.device_runtime.terms.left import Record
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.terms.words import left_in_words

NOISE, RATE, DELTA = 2.0, 0.5, 1e-5


def work(**changes):
    fields = {"steps": STEPS, "seed": 1, "sample_clip": 1.0, "sample_noise": NOISE, "sample_rate": RATE}
    return LocalWork(**{**fields, **changes})


def terms(**changes):
    return Terms(**{"least_samples": 0, "least_effective": 0, **changes})


def epsilon(rounds):
    return epsilon_of_steps([Steps(NOISE, RATE, rounds * STEPS)], DELTA)


def declined(stage, number, asked=None):
    stage.aggregator.offer(number, work=asked or work())
    stage.poll(STEPS + 6)
    messages = stage.aggregator.heard(Decline, UpdateReady)
    assert [type(message) for message in messages] == [Decline]
    return messages[0].reason


def spent(stage):
    return [kind.count for kind in Account(stage.device.files).read().steps]


def test_rounds_are_spent_until_the_owner_s_limit_and_a_restart_forgets_none(tmp_path):
    stage = Stage(tmp_path, terms=terms(most_epsilon=epsilon(2) + 0.01))
    stage.trained(1, work=work())
    stage.device.kill()
    stage.device.start()
    stage.aggregator.status("two")
    stage.poll()
    stage.trained(2, work=work())
    reason = declined(stage, 3)
    assert (
        f"most_epsilon: {epsilon(3):.4g} of its data would be spent, {epsilon(2) + 0.01:.15g} at most"
        in reason
    )
    assert spent(stage) == [2 * STEPS]


def test_work_that_is_taken_up_again_after_a_kill_is_spent_once_and_before_its_first_step(tmp_path):
    stage = Stage(tmp_path, terms=terms())
    stage.aggregator.offer(1, work=work())
    while not stage.device.files.read(FILE):
        assert "step" not in stage.device.kinds()
        stage.poll()
    stage.device.kill()
    stage.device.start()
    stage.aggregator.status("two")
    stage.poll()
    stage.trained(1, work=work())
    assert spent(stage) == [STEPS]


def test_other_data_under_the_same_offer_is_spent_again():
    files = MemoryFiles()
    contract = Contract(terms(), facts=MemoryOutbox(), files=files)
    for data in ("one", "one", "other", "other"):
        contract.begin("key", hiding=work(), data=data)
    assert [kind.count for kind in Account(files).read().steps] == [2 * STEPS]


def test_nothing_is_told_of_samples_beside_the_update(tmp_path):
    update = Stage(tmp_path, terms=terms()).trained(1, work=work())
    assert (update.stats, update.histogram, update.num_samples) == ({}, [], 1)


def test_the_record_and_the_owner_are_told_what_is_spent(tmp_path):
    stage = Stage(tmp_path, terms=terms())
    stage.trained(1, work=work())
    (line,) = Record(stage.device.files).newest(9)
    assert (line.sample_noise, line.epsilon) == (NOISE, pytest.approx(epsilon(1)))
    assert f"each sample hidden, epsilon {epsilon(1):.3g} spent" in left_in_words(line)


@pytest.mark.parametrize("allowed", [0.0, 8.0])
def test_the_floor_of_samples_in_effect_holds_where_no_epsilon_does(tmp_path, allowed):
    def few(training):
        training.effective_samples = 1.0
        return training

    stage = Stage(
        tmp_path,
        terms=terms(least_effective=4, most_epsilon=allowed),
        workbench=workbench_of(3, wrap=few),
    )
    if allowed:
        stage.trained(1, work=work())
    else:
        assert "least_effective: 1 asked for" in declined(stage, 1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_clip": math.nan}, "sample_clip must be at least 0, got nan"),
        ({"sample_clip": -1.0}, "sample_clip must be at least 0"),
        ({"sample_noise": -1.0}, "sample_noise must be at least 0"),
        ({"sample_noise": 0.0}, "sample_noise must be above 0"),
        ({"sample_noise": 1e-5}, "most_epsilon"),
        ({"sample_rate": math.inf}, "sample_rate must be"),
        ({"sample_rate": 0.1}, "least_batch: 1 asked for, 4 at least"),
        ({"steps": 0, "epochs": 10**9}, "most_steps"),
        ({"personal": 1}, "personal keeps back layers"),
        ({"learns": CLASS_MEANS}, "class-means have no noise"),
    ],
)
def test_what_hides_nothing_is_declined_in_a_line_and_not_spent(tmp_path, changes, said):
    stage = Stage(tmp_path, terms=terms())
    assert said in declined(stage, 1, work(**changes))
    assert not spent(stage)


def test_an_owner_may_take_no_other_training(tmp_path):
    stage = Stage(tmp_path, terms=terms(private_only=True))
    assert "private_only: the work does not hide each sample" in declined(
        stage, 1, LocalWork(steps=STEPS, seed=1)
    )
    stage.trained(2, work=work())


def test_without_the_library_work_is_declined_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    stage = Stage(tmp_path, terms=terms(most_epsilon=0.0))
    assert "pip install 'fleetune[privacy]'" in declined(stage, 1, work(sample_noise=2.3456789))


def test_a_damaged_account_declines_and_stays(tmp_path):
    stage = Stage(tmp_path, terms=terms())
    stage.device.files.write(FILE, b"{}")
    assert "what this device's data has spent is not known" in declined(stage, 1)
    assert stage.device.files.read(FILE) == b"{}"
