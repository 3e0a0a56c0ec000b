"""Figures reach a tracker as they come, and a tracker's failure reaches no run."""

import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from flat import train
from typer.testing import CliRunner

from fleetune.broker.store.rows import Row
from fleetune.device_runtime.contracts.evaluation_file import Evaluated
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.training.step_reports import StepReport
from fleetune.toolkit.cli import app
from fleetune.toolkit.commands import running
from fleetune.toolkit.trackers import EVENTS, figures_of, tracking

STEP = StepReport(3, 10, 2.5, 4, 0.25)
FOUND = Evaluated(step=4, num_samples=9, loss=None, accuracy=0.5, macro_f1=0.25)


class Stand:
    """In the place of mlflow, tensorboardX and wandb: keeps what it is told."""

    def __init__(self, fails_at=None):
        self.told, self.fails_at, self.closed, self.run, self.purged = [], fails_at, 0, None, None

    def take(self, step, figures):
        if step == self.fails_at:
            raise RuntimeError("the server\nis away")
        self.told += [(name, value, step) for name, value in figures.items()]

    def close(self):
        self.closed += 1


@pytest.fixture
def mlflow(monkeypatch):
    stand = Stand(fails_at=99)
    module = SimpleNamespace(
        start_run=lambda run_name: setattr(stand, "run", run_name),
        log_metrics=lambda figures, step: stand.take(step, figures),
        end_run=stand.close,
    )
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return stand


@pytest.fixture
def wandb(monkeypatch):
    stand = Stand()
    opened = SimpleNamespace(log=lambda figures, step: stand.take(step, figures), finish=stand.close)

    def init(*, name, dir, settings):
        stand.run = name, settings
        return opened

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **given: given))
    return stand


@pytest.fixture
def tensorboard(monkeypatch):
    stand = Stand()

    def writer(folder, *, purge_step):
        stand.run, stand.purged = folder, purge_step
        return SimpleNamespace(
            add_scalar=lambda name, value, step: stand.take(step, {name: value}), close=stand.close
        )

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=writer))
    return stand


@pytest.mark.parametrize("name", ["mlflow", "tensorboard", "wandb"])
def test_each_tracker_is_told_of_steps_and_evaluations_and_closed(name, tmp_path, request):
    stand = request.getfixturevalue(name)
    with tracking(name, tmp_path / "run") as take:
        for report in (STEP, "a remark", FOUND):
            take(report)
    assert stand.told == [
        ("train/loss", 2.5, 4),
        ("train/step_ms", 250.0, 4),
        ("eval/accuracy", 0.5, 4),
        ("eval/macro_f1", 0.25, 4),
    ]
    assert stand.closed == 1


def test_they_know_the_run_by_its_folder(mlflow, wandb, tensorboard, tmp_path):
    for name in ("mlflow", "tensorboard", "wandb"):
        with tracking(name, tmp_path / "run") as take:
            take(STEP)
    assert mlflow.run == "run"
    assert wandb.run == ("run", {"console": "off", "disable_git": True, "save_code": False})
    assert (tensorboard.run, tensorboard.purged) == (str(tmp_path / "run" / EVENTS), 4)


def test_a_row_of_a_federation_is_told_by_its_round():
    step, figures = figures_of(Row(round=7, devices=2, accuracy=0.5, bytes_up=10))
    assert (step, figures) == (7, {"eval/accuracy": 0.5, "bytes/down": 0, "bytes/up": 10})


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(mlflow, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), tracking("mlflow", tmp_path) as take:
        take(STEP._replace(step=98))
        take(STEP)
    assert (mlflow.told, mlflow.closed) == ([], 0)
    assert caplog.messages == ["mlflow is logged to no more: the server?is away"]


def test_an_error_of_the_run_passes_and_closes_the_tracker(mlflow, tmp_path):
    with pytest.raises(KeyboardInterrupt), tracking("mlflow", tmp_path):
        raise KeyboardInterrupt
    assert mlflow.closed == 1


def test_a_library_that_is_missing_or_cannot_begin_is_one_line(monkeypatch, mlflow, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(ConfigError, match=r"needs wandb; run: pip install 'fleetune\[wandb\]'"),
        tracking("wandb", tmp_path),
    ):
        pass
    monkeypatch.setattr(sys.modules["mlflow"], "start_run", lambda run_name: 1 / 0)
    with (
        pytest.raises(ConfigError, match="mlflow cannot be logged to: division by zero"),
        tracking("mlflow", tmp_path),
    ):
        pass
    with (
        pytest.raises(UnknownName, match="no tracker 'neptune'; have: mlflow, tensorboard, wandb"),
        tracking("neptune", tmp_path),
    ):
        pass


def test_train_tells_it_all_and_learns_the_same(tensorboard, word_artifact, word_file, tmp_path):
    flags = ["--steps", "3", "--batch-size", "8", "--seq-len", "16", "--threads", "1"]
    words = ["train", str(word_artifact), "--data", str(word_file), "--eval", str(word_file), *flags]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--log-to", "tensorboard"])
    assert done.exit_code == 0, done.output
    losses = train(
        word_artifact, data=word_file, out=tmp_path / "other", steps=3, batch_size=8, seq_len=16, threads=1
    ).losses
    assert [(v, s) for name, v, s in tensorboard.told if name == "train/loss"] == [
        (loss, step) for step, loss in enumerate(losses, 1)
    ]
    assert [(name, step) for name, _, step in tensorboard.told if name.startswith("eval/")] == [
        ("eval/loss", 3),
        ("eval/accuracy", 3),
        ("eval/balanced_accuracy", 3),
        ("eval/macro_f1", 3),
    ]
    assert tensorboard.closed == 1


def test_the_file_may_name_the_tracker(tensorboard, word_artifact, word_file, tmp_path):
    (tmp_path / "run.toml").write_text('[train]\nlog_to = "tensorboard"\nsteps = 1\nbatch_size = 8\n')
    words = ["train", str(word_artifact), "--data", str(word_file), "--config", str(tmp_path / "run.toml")]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert [name for name, *_ in tensorboard.told if name == "train/loss"] == ["train/loss"]
    (tmp_path / "run.toml").write_text("log_to = 3\n")
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "other")])
    assert done.exit_code == 1
    assert "log_to = 3: Expected `str`" in done.output


def test_aggregate_tells_its_rounds(tensorboard, monkeypatch, tmp_path):
    def aggregate(
        artifact_dir: str, *, mqtt: str, out: str, on_round: Any, on_note: Any, **rest: Any
    ) -> None:
        on_note("waiting")
        for number in (0, 1):
            on_round(Row(round=number, devices=2, loss=1.0 - number))

    monkeypatch.setattr(running, "import_module", lambda name: SimpleNamespace(aggregate=aggregate))
    words = ["aggregate", "x", "--mqtt", "mqtt://h", "--job", "j", "--rounds", "1", "--clients", "2"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--log-to", "tensorboard"])
    assert done.exit_code == 0, done.output
    assert [told for told in tensorboard.told if told[0] == "eval/loss"] == [
        ("eval/loss", 1.0, 0),
        ("eval/loss", 0.0, 1),
    ]
    assert tensorboard.purged == 0


def test_tensorboard_itself_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboardX")
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with tracking("tensorboard", tmp_path) as take:
        take(STEP)
    found = reading.EventAccumulator(str(tmp_path / EVENTS)).Reload().Scalars("train/loss")
    assert [(one.step, one.value) for one in found] == [(4, 2.5)]
