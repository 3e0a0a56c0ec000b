"""A run is measured while it trains, stops when it no longer improves, and decides the same however often it is killed."""

import json
import signal

import numpy as np
import pytest
from flat import train

from fleetune.device_runtime.commands import train as training
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.evaluation_file import Evaluated, read_log
from fleetune.device_runtime.errors import ConfigError, DataError, StateError
from fleetune.device_runtime.training.evaluation import Evaluation

OPTIONS = {"batch_size": 8, "seq_len": 16, "lr": 0.02, "threads": 1, "eval_split": 0.2, "epochs": 8}
LOSSES = {12: 0.9, 24: 0.5, 36: 0.7, 48: 0.6, 60: 0.4, 72: 0.8}


class Killed(BaseException):
    """No handler of errors may catch it."""


@pytest.fixture
def losses(monkeypatch):
    """Have evaluations find what a test says, in the order of the steps; returns the steps at which they were made."""
    made = []

    def scripted(by_step):
        real = training.Watch.look

        def look(watch):
            watch._measure = lambda adapter: (
                made.append(step := watch._trainer.step_index) or Evaluation(by_step[step], 0.5, 24)
            )
            return real(watch)

        monkeypatch.setattr(training.Watch, "look", look)
        return made

    return scripted


def adapter_of(run, artifact):
    return load_peft(run / "adapter", open_artifact(artifact).manifest)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_stops_when_its_patience_is_over_and_keeps_the_best(word_artifact, word_file, tmp_path, losses):
    made, notes = losses(LOSSES), []
    report = train(
        word_artifact, data=word_file, out=tmp_path / "run", patience=2, on_note=notes.append, **OPTIONS
    )
    assert made == [12, 24, 36, 48]
    assert (report.steps, report.best_step, report.num_samples) == (48, 24, 96)
    assert [row[:2] for row in report.evaluations] == [(12, 0.9), (24, 0.5), (36, 0.7), (48, 0.6)]
    assert "stopped at step 48 of 96: no lower loss since step 24; more --patience goes on" in notes
    exact = train(
        word_artifact, data=word_file, out=tmp_path / "exact", **{**OPTIONS, "epochs": 2, "eval_split": 0.2}
    )
    assert exact.steps == 24
    assert same(adapter_of(tmp_path / "run", word_artifact), adapter_of(tmp_path / "exact", word_artifact))


def test_more_patience_goes_on_and_the_same_trains_nothing(word_artifact, word_file, tmp_path, losses):
    made = losses(LOSSES | {84: 0.9, 96: 0.9})
    run = {"data": word_file, "out": tmp_path / "run", **OPTIONS}
    first = train(word_artifact, patience=2, **run)
    again = train(word_artifact, patience=2, **run)
    assert (again.steps, again.best_step, len(made)) == (first.steps, 24, 4)
    more = train(word_artifact, patience=3, **run)
    assert (more.steps, more.best_step) == (96, 60)
    longer = train(word_artifact, patience=3, **{**run, "epochs": 9})
    assert (longer.steps, longer.best_step) == (96, 60)


@pytest.mark.parametrize("at", [5, 12, 30, 36, 47])
def test_a_killed_run_decides_the_same(word_artifact, word_file, tmp_path, losses, at):
    losses(LOSSES)
    run = {"data": word_file, "patience": 2, "checkpoint_every": 7, **OPTIONS}
    whole = train(word_artifact, out=tmp_path / "whole", **run)

    def kill(report):
        if report.step == at:
            raise Killed

    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "cut", on_step=kill, **run)
    again = train(word_artifact, out=tmp_path / "cut", **run)
    assert (again.steps, again.best_step, again.evaluations) == (
        whole.steps,
        whole.best_step,
        whole.evaluations,
    )
    assert same(adapter_of(tmp_path / "cut", word_artifact), adapter_of(tmp_path / "whole", word_artifact))


def test_a_kill_between_a_measurement_and_its_record_decides_the_same(
    word_artifact, word_file, tmp_path, losses, monkeypatch
):
    losses(LOSSES)
    run = {"data": word_file, "patience": 2, "checkpoint_every": 7, **OPTIONS}
    whole = train(word_artifact, out=tmp_path / "whole", **run)
    real = training.Watch._save

    def save(watch, adapter):
        if len(watch.rows) == 3:
            raise Killed
        real(watch, adapter)

    monkeypatch.setattr(training.Watch, "_save", save)
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "cut", **run)
    monkeypatch.setattr(training.Watch, "_save", real)
    again = train(word_artifact, out=tmp_path / "cut", **run)
    assert (again.evaluations, again.best_step) == (whole.evaluations, whole.best_step)


def test_evaluations_alone_change_no_result(word_artifact, word_file, tmp_path):
    run = {"data": word_file, **OPTIONS, "epochs": 2}
    plain = train(word_artifact, out=tmp_path / "plain", **run)
    seen = train(word_artifact, out=tmp_path / "seen", eval_every=7, **run)
    assert [row.step for row in seen.evaluations] == [7, 14, 21, 24]
    assert seen.evaluations[-1].loss == plain.eval_loss == seen.eval_loss
    assert (seen.best_step, plain.evaluations) == (None, [])
    assert same(adapter_of(tmp_path / "seen", word_artifact), adapter_of(tmp_path / "plain", word_artifact))
    told = json.loads((tmp_path / "seen" / "run.json").read_text())
    assert told["report"]["evaluations"][0][0] == 7
    assert told["arguments"]["evaluating"]["eval_every"] == 7


def test_each_evaluation_is_logged_and_the_file_is_of_the_adapter_that_is_kept(
    word_artifact, word_file, tmp_path
):
    run = {"data": word_file, "out": tmp_path / "run", **OPTIONS, "lr": 0.5}
    notes = []
    report = train(word_artifact, patience=1, on_note=notes.append, **run)
    log = read_log(tmp_path / "run")
    assert [(row.step, row.loss) for row in log] == [row[:2] for row in report.evaluations]
    assert log == [note for note in notes if isinstance(note, Evaluated)]
    assert {row.num_samples for row in log} == {24}
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    best = min(log, key=lambda row: row.loss)
    assert (kept["step"], kept["loss"], kept["data"]) == (report.best_step, report.eval_loss, str(word_file))
    assert (best.step, best.loss, best.macro_f1) == (kept["step"], kept["loss"], kept["macro_f1"])
    assert best.step < log[-1].step == report.steps


def test_a_loss_that_is_not_finite_is_never_the_best(word_artifact, word_file, tmp_path, losses):
    losses({12: float("nan"), 24: 0.5, 36: float("inf"), 48: float("nan")})
    run = {"data": word_file, "out": tmp_path / "run", "patience": 2, **OPTIONS}
    assert train(word_artifact, **run).best_step == 24
    assert train(word_artifact, **run).best_step == 24


def test_a_signal_in_an_evaluation_leaves_a_run_that_goes_on(word_artifact, word_file, tmp_path, losses):
    losses(LOSSES)
    run = {"data": word_file, "out": tmp_path / "run", "patience": 2, **OPTIONS}

    def interrupt(note):
        if str(note).startswith("step 24:"):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(word_artifact, on_note=interrupt, **run)
    assert (train(word_artifact, **run).steps, train(word_artifact, **run).best_step) == (48, 24)


def test_a_damaged_record_is_named(word_artifact, word_file, tmp_path, losses):
    losses(LOSSES)
    run = {"data": word_file, "out": tmp_path / "run", "patience": 2, **OPTIONS}
    train(word_artifact, **run)
    (tmp_path / "run" / "best.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(
        StateError, match=r"best\.safetensors: damaged, or not there; --no-resume starts anew"
    ):
        train(word_artifact, **run)
    assert train(word_artifact, resume=False, **run).best_step == 24


def test_what_cannot_be_measured_on_is_refused(word_artifact, word_file, tmp_path):
    run = {"data": word_file, "out": tmp_path / "run", "steps": 2, "batch_size": 4}
    for more, message in (
        ({"eval_split": 0.1, "eval": word_file}, "give --eval or --eval-split, got both"),
        ({"patience": 2}, "--eval-every and --patience need --eval or --eval-split"),
        ({"eval_every": 2}, "--eval-every and --patience need"),
        ({"eval_split": 1.0}, "eval_split"),
        ({"eval_split": -0.1}, "eval_split"),
        ({"eval_split": float("nan")}, "eval_split"),
        ({"eval_split": 0.1, "patience": -1}, "patience"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(word_artifact, **run, **more)
    with pytest.raises(
        DataError, match=r"words\.csv: an evaluation split of 0\.001 holds out no sample; raise it"
    ):
        train(word_artifact, **run, eval_split=0.001)
