import msgspec
import numpy as np
import pytest
from fleet import STEPS, Step, first_adapter, workbench_of
from stage import Stage, locally

from fleetune.device_runtime.agent import local_run
from fleetune.device_runtime.arrays import load_arrays, save_arrays
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import Decline, Report, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, DataError, StateError, TooLittleMemory


@pytest.mark.parametrize("polls", [1, 2, 3, 4, 5, 6])
def test_a_killed_device_resumes_and_delivers_the_same(tmp_path, polls):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    stage.poll(polls)
    stage.device.kill()
    stage.device.start()
    if "trained" not in stage.device.kinds():
        stage.aggregator.offer()
        stage.until("trained")
    stage.poll()
    update = stage.aggregator.heard(UpdateReady)[-1]
    values = decode_update(stage.pull(update), first_adapter())
    assert np.array_equal(values["w"], locally(1)["w"])


def test_a_resumed_device_does_not_repeat_the_steps_of_its_checkpoint(tmp_path):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    while sum(e.kind == "step" for e in stage.device.events) < 3:
        stage.poll()
    stage.device.kill()
    stage.device.events.clear()
    stage.device.start()
    stage.trained()
    assert [e.values["step"] for e in stage.device.events if e.kind == "step"] == [3, 4]
    assert list(stage.device.folder.glob("work-*")) == []


def test_a_damaged_checkpoint_is_started_over(tmp_path, caplog):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    while not list(stage.device.folder.glob("work-*")):
        stage.poll()
    stage.device.kill()
    next(stage.device.folder.glob("work-*")).write_bytes(b"torn")
    stage.device.start()
    update = stage.trained()
    assert "round 1: starting afresh" in caplog.text
    assert np.array_equal(decode_update(stage.pull(update), first_adapter())["w"], locally(1)["w"])


def test_a_checkpoint_whose_content_cannot_be_used_is_started_over(tmp_path, caplog):
    def wrap(training):
        def restore(path):
            raise StateError(f"{path.name}: a damaged checkpoint: its checksum differs")

        training.restore = restore
        return training

    stage = Stage(tmp_path, workbench=workbench_of(3, wrap=wrap))
    stage.aggregator.offer()
    while not list(stage.device.folder.glob("work-*")):
        stage.poll()
    stage.device.kill()
    stage.device.start()
    update = stage.trained()
    assert "starting afresh" in caplog.text
    assert "its checksum differs" in caplog.text
    assert np.array_equal(decode_update(stage.pull(update), first_adapter())["w"], locally(1)["w"])


@pytest.mark.parametrize(
    ("error", "reason", "cause"),
    [
        (KeyError(("side", 0)), "unexpected KeyError: ('side', 0); this is a fault of fleetune", ""),
        (RuntimeError("two\nlines\x1b[2J" + "x" * 9999), "unexpected RuntimeError: two lines?[2Jxxx", ""),
        (MemoryError(), "not enough memory for this work", "memory"),
        (TooLittleMemory("memory budget of 9 MB"), "memory budget of 9 MB", "memory"),
        (ConfigError("no policy 'x'"), "no policy 'x'", "work"),
        (DataError("a.jsonl, line 7: no"), "a.jsonl, line 7: no", ""),
    ],
)
def test_a_device_that_fails_declines_and_lives(tmp_path, error, reason, cause):
    fails = [True]

    def wrap(training):
        def step():
            raise error

        if fails:
            fails.pop()
            training.step = step
        return training

    stage = Stage(tmp_path, workbench=workbench_of(3, wrap=wrap))
    stage.aggregator.offer()
    stage.poll(3)
    (declined,) = stage.aggregator.heard(Decline)
    assert declined.reason.startswith(reason)
    assert declined.cause == cause
    assert declined.reason.isprintable()
    assert len(declined.reason) <= REASON_CHARS_MAX
    assert stage.trained(2).round == 2


def test_data_that_fails_when_a_round_begins_is_declined(tmp_path):
    def start(work, adapter):
        raise OSError(5, "Input/output error")

    stage = Stage(tmp_path, workbench=workbench_of(3)._replace(start=start))
    stage.aggregator.offer()
    stage.poll(3)
    (declined,) = stage.aggregator.heard(Decline)
    assert "Input/output error" in declined.reason


def test_a_loss_that_is_no_number_is_not_reported(tmp_path):
    bench = workbench_of(3)
    measured = bench.evaluate(None, first_adapter())._replace(loss=float("nan"))
    stage = Stage(
        tmp_path, role="evaluate", workbench=bench._replace(evaluate=lambda work, adapter: measured)
    )
    stage.aggregator.offer(1, role="evaluate")
    stage.until("declined")
    (declined,) = stage.aggregator.heard(Report, Decline)
    assert "the loss is nan: NaN in the model's weights" in declined.reason


def test_what_a_lossy_codec_owes_is_added_next_time(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    sent = decode_update(stage.pull(first), first_adapter())["w"]
    owed = locally(1)["w"].astype(np.float64) - sent
    assert owed.any(), "int8 conveys it all: the codec of the offer is not used"
    stage.aggregator.verdict(first)
    stage.poll()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    conveyed = decode_update(stage.pull(second), first_adapter())["w"]
    np.testing.assert_array_equal(conveyed, (locally(1)["w"] + owed).astype(np.float32))


class Resting:
    """A training that touches nothing: every layer is dropped in every step."""

    def __init__(self, training):
        self.adapter, self.history, self.stats, self.step_index = training.adapter, [], {}, 0
        self.done = True
        self.restore = training.restore


def test_what_is_owed_of_a_layer_that_did_not_train_is_sent_too(tmp_path):
    trains = [True, False]
    stage = Stage(tmp_path, workbench=workbench_of(3, wrap=lambda t: t if trains.pop(0) else Resting(t)))
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    owed = locally(1)["w"] - decode_update(stage.pull(first), first_adapter())["w"]
    stage.aggregator.verdict(first)
    stage.poll()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    conveyed = decode_update(stage.pull(second), first_adapter())
    assert conveyed.keys() == {"w", "b"}
    np.testing.assert_array_equal(conveyed["w"], (first_adapter()["w"] + owed).astype(np.float32))


def test_what_a_device_of_0_1_0_owed_is_sent_after_the_upgrade(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    owed = locally(1)["w"].astype(np.float64) - decode_update(stage.pull(first), first_adapter())["w"]
    stage.aggregator.verdict(first)
    stage.poll()
    stage.device.outbox.remember("made/job/1", b"as 0.1.0 keeps it, by round")
    stage.device.kill()
    (new,) = stage.device.folder.glob("memory-*")
    old = {name.removeprefix("residual/"): value for name, value in load_arrays(new).items()}
    save_arrays(stage.device.folder / "residual-000001.safetensors", old)
    new.unlink()
    stage.device.start()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    conveyed = decode_update(stage.pull(second), first_adapter())["w"]
    np.testing.assert_array_equal(conveyed, (locally(1)["w"] + owed).astype(np.float32))


def test_topk_sends_the_share_that_the_offer_says_and_owes_the_rest(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="topk", codec_ratio=0.01)
    first = stage.trained(1, work=work)
    moved = decode_update(stage.pull(first), first_adapter())["w"] - first_adapter()["w"]
    assert 0 < np.count_nonzero(moved) <= 31
    stage.aggregator.verdict(first)
    stage.poll()
    rest = LocalWork(steps=STEPS, seed=1, codec="fp32")
    conveyed = decode_update(stage.pull(stage.trained(2, work=rest)), first_adapter())["w"]
    all_of_it = 2 * np.float64(locally(1)["w"]) - first_adapter()["w"]
    np.testing.assert_allclose(conveyed + moved, all_of_it, atol=1e-6)


def test_a_codec_that_is_not_known_is_declined(stage):
    stage.aggregator.offer(1, work=LocalWork(steps=1, codec="topk"))
    stage.until("declined")
    assert stage.device.events[-1].text == "codec 'topk': its ratio is above 0 and at most 1, got 0"


def test_what_a_refused_update_owed_is_forgotten(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    stage.aggregator.verdict(first, accepted=False, reason="late")
    stage.poll()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    np.testing.assert_array_equal(decode_update(stage.pull(second), first_adapter())["w"], locally(1)["w"])


def test_an_evaluating_device_reports_until_there_is_a_verdict(tmp_path):
    stage = Stage(tmp_path, role="evaluate")
    stage.aggregator.offer(1, role="evaluate")
    stage.until("evaluated")
    stage.poll()
    (report,) = stage.aggregator.heard(Report)
    expected = workbench_of(3).evaluate(None, first_adapter())
    assert (report.loss, report.accuracy, report.num_samples) == tuple(expected)
    stage.now += 10
    stage.poll()
    assert stage.aggregator.heard(Report) == [report]
    stage.aggregator.verdict(report)
    stage.now += 100
    stage.poll(2)
    assert stage.aggregator.heard(Report) == []


def test_what_an_update_tells_of_its_run():
    steps = [Step(loss=float(30 - i), active_layers=1 + i % 2, seconds=0.5) for i in range(30)]
    assert local_run._stats(steps, {"trained_layers": 2.0}) == {
        "loss": sum(range(1, 21)) / 20,
        "loss_first": sum(range(11, 31)) / 20,
        "active_layers": 1.5,
        "seconds": 15.0,
        "trained_layers": 2.0,
    }
    assert local_run._stats([], {}) == {}
