"""An evaluating device keeps its figures by class; the aggregator is told no more than before."""

import logging

import msgspec
import pytest

from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.commands.own_evaluations import OwnEvaluations
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.evaluation_file import EvaluationFile, read_log
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.run_file import EVALUATION, EVALUATION_CSV, EVALUATIONS
from fleetune.device_runtime.contracts.wire import Report
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.training.machine import Machine


@pytest.fixture
def judge(word_artifact, word_file, tmp_path):
    """Measures version 0 with real graphs, and tells of it as of a round."""
    artifact = open_artifact(word_artifact)
    dataset = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    told = []
    kept = OwnEvaluations(tmp_path / "state", artifact.manifest, word_file, then=told.append)

    def run(number):
        with Machine(artifact, Resources(threads=1), folder=tmp_path / "cache") as machine:
            found = kept.judge(machine, dataset, artifact.adapter(), before_batch=lambda: None)
        kept(event := Event("evaluated", number, {"loss": found.loss, "accuracy": found.accuracy}))
        assert told.pop() == event
        return found

    run.folder, run.kept, run.told = tmp_path / "state", kept, told
    return run


def test_what_was_measured_is_kept_by_round_for_the_owner_alone(judge):
    judge(0)
    found = judge(3)
    kept = msgspec.json.decode((judge.folder / EVALUATION).read_bytes(), type=EvaluationFile)
    assert (kept.round, kept.step, kept.loss, kept.accuracy) == (3, None, found.loss, found.accuracy)
    assert sum(map(sum, kept.confusion)) == found.num_samples == 120
    assert [line.round for line in read_log(judge.folder)] == [0, 3]
    for name in (EVALUATION, EVALUATION_CSV, EVALUATIONS):
        assert (judge.folder / name).stat().st_mode & 0o777 == 0o600


def test_what_was_measured_is_written_once(judge):
    judge(1)
    judge.kept(Event("evaluated", 2))
    assert [line.round for line in read_log(judge.folder)] == [1]


def test_nothing_is_written_before_the_report_is_on_its_way(judge):
    judge.kept(Event("evaluated", 1))
    judge.kept(Event("step", 1))
    assert [event.kind for event in judge.told] == ["evaluated", "step"]
    assert not judge.folder.exists()


def test_a_folder_that_cannot_be_written_is_a_warning(judge, caplog):
    judge.folder.touch()
    with caplog.at_level(logging.WARNING):
        judge(2)
    assert "round 2: " in caplog.text


def test_a_report_has_the_figures_that_it_always_had():
    assert Report.__struct_fields__[1:] == (
        "device_id", "job", "task_id", "round", "version", "loss", "accuracy", "num_samples",
    )  # fmt: skip
