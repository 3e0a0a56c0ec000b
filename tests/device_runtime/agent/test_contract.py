"""A device under its owner's contract: what it declines, what it lets go, and what it remembers of both."""

import shutil
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
from fleet import STEPS, LinearTraining, Step, first_adapter, points_of, workbench_of, world
from paths import ROOT
from stage import NAME, Stage, locally

from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, blank_sums
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.wire import Chunk, Decline, Report, Request, UpdateReady
from fleetune.device_runtime.contracts.work import CLASS_MEANS, LocalWork, PolicySpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.terms.left import Record
from fleetune.device_runtime.terms.terms import Terms

SAMPLES = 8  # of device 3


def staged(tmp_path, terms=Terms(), **options):
    terms = msgspec.structs.replace(terms, least_effective=0)  # of its eight samples
    clock = SimpleNamespace(now=0.0, wall=1_800_000_000.0)
    clocks = {"clock": lambda: clock.now, "wall": lambda: clock.wall}
    stage = Stage(tmp_path, terms=terms, clocks=clocks, **options)
    stage.clock = clock
    return stage


def declined(stage, number=1, **changes):
    stage.aggregator.offer(number, **changes)
    stage.poll(STEPS + 4)
    (decline,) = stage.aggregator.heard(Decline)
    return decline


def lines(stage):
    return Record(stage.device.files).newest(99)


def delivered(stage, number=1, **changes):
    update = stage.trained(number, **changes)
    payload = stage.pull(update)
    stage.aggregator.verdict(update)
    stage.poll()
    return update, payload


@pytest.mark.parametrize(
    ("terms", "work", "said"),
    [
        (Terms(), LocalWork(steps=1, batch_size=1), "least_samples: 1 asked for, 8 at least (7 too few)"),
        (Terms(), LocalWork(steps=99, batch_size=1), "least_batch: 1 asked for, 4 at least (3 too few)"),
        (Terms(least_samples=16), LocalWork(steps=4), "least_samples: 8 asked for, 16 at least (8 too few)"),
        (Terms(), LocalWork(steps=10**9), "most_steps: 1,000,000,000 asked for, 100,000 at most"),
        (Terms(), LocalWork(seq_len=10**6), "most_tokens: 1,000,000 asked for, 8,192 at most"),
        (Terms(), LocalWork(seq_len=-1), "seq_len must be at least 1, got -1"),
        (Terms(policies="full"), LocalWork(policy=PolicySpec(name="head")), "asked for head"),
    ],
)  # fmt: skip
def test_an_offer_outside_is_declined_with_the_reason_before_any_work(tmp_path, terms, work, said):
    stage = staged(tmp_path, terms)
    decline = declined(stage, work=work)
    assert said in decline.reason
    assert decline.cause == "work"
    assert stage.device.kinds() == ["offer", "declined"]
    assert not [event for event in stage.device.events if event.kind == "step"]
    assert lines(stage) == []


def test_an_offer_within_gives_the_same_bits_as_without_a_contract(tmp_path):
    stage = staged(tmp_path)
    update, payload = delivered(stage)
    values = decode_update(payload, first_adapter())
    assert all(np.array_equal(values[name], locally(1)[name]) for name in values)
    change = [values[name].astype(float) - first_adapter()[name] for name in values]
    assert update.stats["change_norm"] == pytest.approx(np.sqrt(sum(np.sum(c * c) for c in change)))
    assert update.stats["clip_scale"] == 1.0
    (left,) = lines(stage)
    assert (left.round, left.version, left.samples, left.steps) == (1, 0, SAMPLES, STEPS)
    assert (left.bytes, left.digest, left.verdict) == (len(payload), update.payload.sha256, "accepted")
    assert left.tensors == {"head": 3}
    assert left.when == "2027-01-15T08:00:00Z"


def test_a_change_beyond_the_limit_is_scaled_down_before_it_is_packed(tmp_path):
    stage = staged(tmp_path, Terms(most_change=1e-9))
    update, payload = delivered(stage)
    values, size = decode_update(payload, first_adapter()), sum(v.size for v in first_adapter().values())
    norm = np.sqrt(sum(np.sum(np.square(values[n] - first_adapter()[n].astype(float))) for n in values))
    assert update.stats["clip_scale"] == pytest.approx(1e-9 * np.sqrt(size) / update.stats["change_norm"])
    assert update.stats["clip_scale"] < 1
    assert norm < 1e-3 * update.stats["change_norm"]
    assert lines(stage)[0].scale == update.stats["clip_scale"]


def test_tensors_that_must_stay_do_not_leave(tmp_path):
    stage = staged(tmp_path, Terms(must_stay="w"))
    _, payload = delivered(stage, work=LocalWork(steps=STEPS, seed=1, codec="int8"))
    assert decode_update(payload, first_adapter()).keys() == {"b"}
    assert (lines(stage)[0].held_back, lines(stage)[0].tensors) == (1, {"head": 2})


def test_a_round_goes_on_without_the_device_that_declines(tmp_path):
    federation = world(tmp_path, numbers=(0, 1, 2), min_clients=2, rounds=2)
    unwilling = federation.devices[0]
    unwilling.kill()
    unwilling.terms = Terms(least_samples=100)
    unwilling.start()
    federation.run()
    assert federation.aggregator.service.finished
    assert "declined" in unwilling.kinds()
    assert "accepted" not in unwilling.kinds()
    assert all("accepted" in device.kinds() for device in federation.devices[1:])


def test_rounds_of_a_day_outlive_a_kill_and_end_with_the_day(tmp_path):
    stage = staged(tmp_path, Terms(most_rounds_a_day=2))
    delivered(stage, 1)
    stage.aggregator.offer(2)
    stage.poll(2)
    stage.device.kill()
    stage.device.start()
    stage.poll()
    delivered(stage, 2)
    decline = declined(stage, 3)
    assert "most_rounds_a_day: 2 of 2 are done" in decline.reason
    assert decline.cause == ""
    stage.device.kill()
    stage.device.start()
    stage.poll()
    assert "most_rounds_a_day" in declined(stage, 4).reason
    stage.clock.now += 86_400
    assert delivered(stage, 5)


def test_bytes_of_a_day_count_what_was_sent_twice_and_stop_it(tmp_path):
    stage = staged(tmp_path, Terms(most_bytes_a_day=30_000))
    _, payload = delivered(stage, 1)
    assert 10_000 < len(payload) < 15_000
    second = stage.trained(2)
    for _ in range(4):
        stage.aggregator.say(Request(sha256=second.payload.sha256, missing=b"\1", limit=1))
        stage.poll()
    assert len(stage.aggregator.heard(Chunk)) == 2, "the third is one too many"
    stage.aggregator.verdict(second, accepted=False)
    stage.poll()
    assert "most_bytes_a_day" in declined(stage, 3).reason


def test_an_update_too_large_for_what_is_left_of_the_day_is_not_offered(tmp_path):
    stage = staged(tmp_path, Terms(most_bytes_a_day=5_000))
    decline = declined(stage)
    assert "to send, 0 of 5,000 are sent" in decline.reason
    assert stage.aggregator.heard(UpdateReady) == []
    assert lines(stage) == []


def slow(training):
    step = training.step

    def slowly():
        step()
        training.history[-1] = Step(0.5, seconds=100.0)
        return training.history[-1]

    training.step = slowly
    return training


def test_work_that_takes_too_long_is_given_up(tmp_path):
    terms = Terms(most_seconds=250)
    stage = staged(tmp_path, terms, workbench=workbench_of(3, wrap=slow))
    decline = declined(stage)
    assert "most_seconds: 300 s of work, 250 at most" in decline.reason


def stuck(training):
    def step():
        raise ConfigError("most_step_seconds: a step was stopped, as it took longer than 0.2 s")

    training.step = step
    return training


def test_a_step_that_was_stopped_declines_the_round_by_name(tmp_path):
    decline = declined(staged(tmp_path, workbench=workbench_of(3, wrap=stuck)))
    assert decline.reason.startswith("most_step_seconds: a step was stopped")
    assert decline.cause == "work"


def test_what_left_is_written_before_it_is_offered_and_once(tmp_path, monkeypatch):
    stage = staged(tmp_path)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stage.device.outbox, "put", killed)
        stage.aggregator.offer(1)
        with pytest.raises(KeyboardInterrupt):
            stage.poll(9)
    assert [line.verdict for line in lines(stage)] == [""]
    stage.device.kill()
    stage.device.start()
    stage.poll()
    delivered(stage, 1)
    assert [line.verdict for line in lines(stage)] == ["accepted"]


def summing(counts):
    def class_sums(work, adapter):
        number = np.array(counts, np.float64)
        return {SUMS: np.ones((len(counts), 4)) * number[:, None], COUNTS: number, SQUARES: 4 * number}, {}

    def start(work, adapter):
        return LinearTraining(points_of(3), work, adapter)

    return Workbench(start, None, int(sum(counts)), class_sums)


def test_classes_with_too_few_samples_are_left_out_of_the_head(tmp_path):
    stage = staged(tmp_path, workbench=summing([1, 9, 3, 4]))
    stage.aggregator.offer(1, work=LocalWork(learns=CLASS_MEANS))
    stage.until("summed")
    stage.poll()
    update = stage.aggregator.heard(UpdateReady)[-1]
    sums = decode_update(stage.pull(update), blank_sums(4, 4))
    assert sums[COUNTS].tolist() == [0, 9, 0, 4]
    assert sums[SUMS][:, 0].tolist() == [0, 9, 0, 4]
    assert sums[SQUARES].tolist() == [0, 36, 0, 16]
    assert lines(stage)[0].samples == 13


def test_class_means_of_nothing_but_small_classes_are_declined(tmp_path):
    stage = staged(tmp_path, workbench=summing([3, 3, 3]))
    decline = declined(stage, work=LocalWork(learns=CLASS_MEANS))
    assert "least_of_a_class: no class has 4 samples here" in decline.reason


def test_an_evaluation_is_recorded_too(tmp_path):
    stage = staged(tmp_path, role="evaluate")
    stage.aggregator.offer(1, role="evaluate")
    stage.until("evaluated")
    stage.poll()
    report = stage.aggregator.heard(Report)[-1]
    stage.aggregator.verdict(report)
    stage.poll()
    (left,) = lines(stage)
    assert (left.kind, left.bytes, left.samples, left.verdict) == ("report", 0, SAMPLES, "accepted")


def test_a_state_folder_of_0_1_is_opened_under_a_contract(tmp_path):
    shutil.copytree(ROOT / "tests" / "data" / "device_0_1", tmp_path / NAME)
    stage = staged(tmp_path, size=30)
    stage.poll(2)
    (first,) = stage.aggregator.heard(UpdateReady)
    assert stage.pull(first)
    stage.aggregator.verdict(first)
    stage.poll()
    assert stage.device.outbox.pending() == []
    assert lines(stage) == [], "it left before there was a record"
    assert stage.trained(2, adapter=first_adapter(30)).round == 2
    assert [line.round for line in lines(stage)] == [2]
