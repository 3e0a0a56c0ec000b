"""An evaluation is written by figures that people know: of ``train``, of ``predict``, and line by line."""

import csv
import json
from itertools import pairwise

import msgspec
import numpy as np
import pytest
from flat import train

from fleetune.device_runtime.commands.evaluating import counter_of, described, keep_evaluation
from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.evaluation_file import LOG_BYTES_MAX, Evaluated, added, read_log
from fleetune.device_runtime.contracts.run_file import EVALUATION, EVALUATION_CSV, EVALUATIONS
from fleetune.device_runtime.data.lines import as_csv
from fleetune.device_runtime.errors import ConfigError, DataError, StateError
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.metrics import CLASSES_MAX, metrics_of

OPTIONS = {"batch_size": 8, "seq_len": 16, "lr": 0.02, "threads": 1}


@pytest.fixture(scope="module")
def run(word_artifact, word_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "run"
    report = train(word_artifact, data=word_file, eval=word_file, out=out, steps=30, **OPTIONS)
    return out, report


def test_a_run_has_its_figures_as_json_and_by_class_as_csv(run, word_artifact, word_file):
    out, report = run
    found = json.loads((out / EVALUATION).read_text())
    metrics = metrics_of(np.array(found["confusion"]))
    assert (found["step"], found["data"], found["num_samples"]) == (30, str(word_file), 120)
    assert found["accuracy"] == report.accuracy == pytest.approx(metrics.accuracy)
    assert (found["loss"], found["perplexity"]) == (report.eval_loss, None)
    assert found["macro_f1"] == report.macro_f1 == metrics.macro_f1 > 0.5
    assert found["balanced_accuracy"] == report.balanced_accuracy == metrics.balanced_accuracy
    labels = list(open_artifact(word_artifact).manifest.labels)
    assert [one["name"] for one in found["classes"]] == labels
    lines = [line.rpartition(",")[2] for line in word_file.read_text().splitlines()[1:]]
    assert [one["support"] for one in found["classes"]] == [lines.count(name) for name in labels]
    with (out / EVALUATION_CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{name: str(value) for name, value in one.items()} for one in found["classes"]]


def test_each_evaluation_of_a_run_has_a_line(run, word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "eval": word_file, "out": tmp_path}
    for steps in (4, 6, 6):
        train(word_artifact, steps=steps, **options)
    first, last = read_log(tmp_path)
    assert (first.step, last.step) == (4, 6)
    found = msgspec.json.decode((tmp_path / EVALUATION).read_bytes(), type=Evaluated)
    assert found == last
    assert last.figures().keys() == {"loss", "accuracy", "balanced_accuracy", "macro_f1"}


def test_what_an_earlier_run_has_left_is_gone_with_it(word_artifact, word_file, tmp_path):
    options = {**OPTIONS, "data": word_file, "out": tmp_path}
    train(word_artifact, steps=4, eval=word_file, **options)
    train(word_artifact, steps=2, resume=False, **options)
    assert not {EVALUATION, EVALUATION_CSV, EVALUATIONS} & {path.name for path in tmp_path.iterdir()}


def test_an_evaluation_is_told(word_artifact, word_file, tmp_path):
    told = []
    train(
        word_artifact, data=word_file, eval=word_file, out=tmp_path, steps=2, on_note=told.append, **OPTIONS
    )
    (found,) = (note for note in told if isinstance(note, Evaluated))
    assert str(found).startswith(f"loss {found.loss:.4g}, accuracy ")
    assert str(found).endswith(f"macro f1 {found.macro_f1:.4g} on 120 samples")


def test_predictions_of_labelled_data_are_judged_as_train_judges(run, word_artifact, word_file, tmp_path):
    out, _ = run
    notes = []
    answers = predict(word_artifact, data=word_file, run=out, out=tmp_path, on_note=notes.append, threads=1)
    found = json.loads((tmp_path / EVALUATION).read_text())
    wanted = json.loads((out / EVALUATION).read_text())
    assert len(answers) == 120
    assert found.pop("loss") == pytest.approx(wanted.pop("loss"), abs=1e-5)
    assert found == {**wanted, "step": None}
    assert (tmp_path / EVALUATION_CSV).read_bytes() == (out / EVALUATION_CSV).read_bytes()
    assert not (tmp_path / EVALUATIONS).exists()
    assert notes[0].endswith(f"on 120 samples; see {tmp_path}")


def test_labels_are_needed_for_figures(run, word_artifact, tmp_path):
    with pytest.raises(ConfigError, match="for figures of labelled data: give a data file"):
        predict(word_artifact, text="red", run=run[0], out=tmp_path)
    (tmp_path / "plain.csv").write_text("text\nred\n")
    with pytest.raises(DataError, match="label"):
        predict(word_artifact, data=tmp_path / "plain.csv", run=run[0], out=tmp_path)
    ids = np.array([[1, 2, 3]])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.array([-100])}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"a\.npz.*labels"):
        predict(word_artifact, data=tmp_path / "a.npz", run=run[0], out=tmp_path)


def test_a_folder_that_cannot_be_is_one_line(run, word_artifact, word_file, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match=r"file: cannot be made: File exists"):
        predict(word_artifact, data=word_file, run=run[0], out=tmp_path / "file")


def line(step):
    return Evaluated(step=step, num_samples=9, loss=1 / (step + 1), accuracy=0.5)


def test_a_line_takes_the_place_of_its_step_and_of_later_ones():
    log = b""
    for step in (2, 4, 6, 4):
        log = added(log, line(step))
    assert [msgspec.json.decode(row)["step"] for row in log.splitlines()] == [2, 4]


def test_a_line_that_cannot_be_read_is_left_out_and_is_an_error_to_readers(tmp_path):
    damaged = added(b"", line(1)) + b'{"step": 2, "num_sa\n'
    assert [msgspec.json.decode(row)["step"] for row in added(damaged, line(3)).splitlines()] == [1, 3]
    (tmp_path / EVALUATIONS).write_bytes(damaged)
    with pytest.raises(DataError, match=r"evaluations\.jsonl, line 2: "):
        read_log(tmp_path)


def test_the_log_does_not_grow_for_ever():
    log, sizes = b"", []
    start = b"".join(msgspec.json.encode(line(step)) + b"\n" for step in range(2600))
    assert len(start) > LOG_BYTES_MAX
    log = added(start, line(2600))
    sizes = [msgspec.json.decode(row)["step"] for row in log.splitlines()]
    assert sizes[0] == 1300
    assert all(b == a + 1 for a, b in pairwise(sizes))


def test_figures_that_are_not_finite_are_null(tmp_path):
    one = Evaluated(step=1, num_samples=3, loss=None, accuracy=0.5)
    assert one.figures() == {"accuracy": 0.5}
    (tmp_path / EVALUATIONS).write_bytes(added(b"", one))
    assert read_log(tmp_path) == [one]


def test_a_language_model_has_a_perplexity_and_no_classes(make_manifest, tmp_path):
    manifest = make_manifest(labels=(), task="causal-lm")
    assert counter_of(manifest) is None
    found = described(Evaluation(2.0, 0.5, 3), None, manifest, data="d.jsonl", step=1)
    assert found.figures() == {"loss": 2.0, "accuracy": 0.5, "perplexity": pytest.approx(np.exp(2.0))}
    assert (found.classes, found.confusion) == ([], None)
    keep_evaluation(tmp_path, found)
    assert (tmp_path / EVALUATION_CSV).read_text().splitlines() == [
        "num_samples,loss,accuracy,perplexity",
        f"3,2.0,0.5,{np.exp(2.0)}",
    ]
    lost = described(Evaluation(float("nan"), 0.0, 3), None, manifest, data="d.jsonl", step=2)
    assert (lost.loss, lost.perplexity) == (None, None)
    keep_evaluation(tmp_path, lost)
    assert json.loads((tmp_path / EVALUATION).read_text())["loss"] is None


def test_of_very_many_classes_there_is_no_matrix(make_manifest):
    manifest = make_manifest(labels=tuple(f"c{n}" for n in range(CLASSES_MAX + 1)))
    counted = counter_of(manifest)
    counted.add(np.array([0, CLASSES_MAX]), np.array([1, CLASSES_MAX]))
    found = described(Evaluation(1.0, 0.5, 2), counted, manifest, data="d.csv")
    assert (found.confusion, found.macro_f1, len(found.classes)) == (
        None,
        pytest.approx(1 / 3),
        CLASSES_MAX + 1,
    )


def test_cells_that_need_quotes_have_them():
    assert as_csv([["name"], ['on, "now"']]) == b'name\r\n"on, ""now"""\r\n'
