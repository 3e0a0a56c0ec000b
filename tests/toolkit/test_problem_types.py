"""Regressions, label sets and class weights: what transformers, torch and scikit-learn say of the same rows."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import sklearn.metrics
import torch
import transformers
from sklearn.utils.class_weight import compute_class_weight
from small_heads import TAGS, export_classifier, in_transformers, save_classifier, trained, write_rows

from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.commands.train import train
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import class_head
from fleetune.device_runtime.contracts.provenance import read_provenance
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.toolkit.export import export
from fleetune.toolkit.labels import choose_problem
from fleetune.toolkit.merge import merge

LABEL_SETS = "multi_label_classification"
WORK = LocalWork(optimizer=OptimizerSpec(lr=1e-2), epochs=2, batch_size=5, seq_len=16, seed=3)
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"problem_type": "regression"}, "number"),
    "two numbers": ({"problem_type": "regression", "labels": ["heat", "light"]}, "both"),
    "label set": ({"problem_type": "multi_label_classification", "labels": TAGS}, "labels"),
}
EACH = [
    pytest.param("number", marks=pytest.mark.slow),
    pytest.param("two numbers", marks=pytest.mark.slow),
    "label set",
]
"""An export each takes some seconds."""


class Run:
    """A model exported and trained, and the rows that it was trained on."""

    def __init__(self, folder: Path, case: str) -> None:
        settings, column = CASES[case]
        self.folder, self.columns = folder, Columns(label_column=column)
        self.artifact = export_classifier(folder, **settings)
        self.data = write_rows(folder / "rows.jsonl")
        self.report = train(
            self.artifact, data=self.data, eval=self.data, columns=self.columns, work=WORK, out=folder / "run"
        )
        manifest = open_artifact(self.artifact, verify=False).manifest
        self.dataset = load_dataset(
            self.data, manifest, self.artifact, seq_len=WORK.seq_len, columns=self.columns
        )
        self.reference = in_transformers(self.artifact, folder / "start")
        batches = [
            self.dataset.rows(rows)
            for epoch in range(WORK.epochs)
            for rows in self.dataset.epoch_batches(WORK.seed, epoch, WORK.batch_size)
        ]
        self.expected = trained(self.reference, batches)
        self.logits = self._logits()
        self.labels = self.dataset.rows(np.arange(self.dataset.num_samples))["labels"]

    def _logits(self) -> Any:
        batch = self.dataset.rows(np.arange(self.dataset.num_samples))
        given = {name: torch.from_numpy(array) for name, array in batch.items() if name != "labels"}
        with torch.no_grad():
            return self.reference(**given).logits.numpy()

    def evaluation(self) -> Any:
        return json.loads((self.folder / "run" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    return cache(lambda case: Run(tmp_path_factory.mktemp("heads"), case))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_classifier(tmp_path_factory.mktemp("classes"), labels=TAGS)


@pytest.mark.parametrize("case", EACH)
def test_losses_are_those_of_transformers_and_peft(runs: Callable[[str], Run], case: str) -> None:
    run = runs(case)
    assert selfcheck(run.artifact).ok
    np.testing.assert_allclose(run.report.losses, run.expected, rtol=2e-5)
    assert np.ptp(run.expected) > 0.01  # different numbers, not one


@pytest.mark.parametrize("case", EACH[:2])
def test_figures_of_a_regression_are_scikit_learns(runs: Callable[[str], Run], case: str) -> None:
    run = runs(case)
    found, answers = run.evaluation(), run.logits.reshape(run.labels.shape)
    expected = {
        "loss": sklearn.metrics.mean_squared_error(run.labels, answers),
        "mae": sklearn.metrics.mean_absolute_error(run.labels, answers),
        "r2": sklearn.metrics.r2_score(run.labels, answers),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    first = [column.reshape(len(run.labels), -1)[:, 0] for column in (answers, run.labels)]
    assert found["outputs"][0]["pearson"] == pytest.approx(np.corrcoef(*first)[0, 1], rel=1e-3)
    assert found["accuracy"] is None is found["perplexity"] is found["confusion"]
    assert run.report.accuracy is None
    assert run.report.r2 == found["r2"]


def test_figures_of_label_sets_are_scikit_learns(runs: Callable[[str], Run]) -> None:
    run = runs("label set")
    found, answers = run.evaluation(), run.logits > 0
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        *map(torch.from_numpy, (run.logits, run.labels))
    )
    assert found["loss"] == pytest.approx(float(bce), rel=1e-4)
    assert found["exact_match"] == pytest.approx(sklearn.metrics.accuracy_score(run.labels, answers))
    for kind in ("micro", "macro"):
        expected = sklearn.metrics.f1_score(run.labels, answers, average=kind, zero_division=0)
        assert found[f"{kind}_f1"] == pytest.approx(expected)
    by_class = sklearn.metrics.precision_recall_fscore_support(run.labels, answers, zero_division=0)
    columns = [[one[name] for one in found["classes"]] for name in ("precision", "recall", "f1", "support")]
    np.testing.assert_allclose(columns, np.array(by_class))
    assert 0 < found["micro_f1"] < 1
    assert (run.folder / "run" / "evaluation.csv").read_text().startswith("name,precision")


@pytest.mark.parametrize("case", EACH)
def test_answers_and_their_figures_are_those_of_the_trained_model(
    runs: Callable[[str], Run], case: str
) -> None:
    run, out = runs(case), runs(case).folder / "predicted"
    answers = predict(run.artifact, data=run.data, run=run.folder / "run", columns=run.columns, out=out)
    if case == "label set":
        scores = [[*one.scores.values()] for one in answers]
        np.testing.assert_allclose(scores, 1 / (1 + np.exp(-run.logits)), atol=1e-4)
        assert [one.labels for one in answers] == [
            [tag for tag, z in zip(TAGS, row, strict=True) if z >= 0] for row in run.logits
        ]
    else:
        np.testing.assert_allclose([[*one.values.values()] for one in answers], run.logits, atol=1e-4)
    again = json.loads((out / "evaluation.json").read_text())
    for name, value in run.evaluation().items():
        if isinstance(value, float):
            assert again[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", EACH[::2])
def test_the_merged_model_answers_by_the_same_loss(runs: Callable[[str], Run], case: str) -> None:
    run = runs(case)
    out = merge(run.folder / "run", out=run.folder / "merged", full=True, model=run.folder / "model")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert merged.config.problem_type == CASES[case][0]["problem_type"] == read_provenance(out).problem_type
    batch = {n: torch.from_numpy(a) for n, a in run.dataset.rows(np.arange(8)).items()}
    with torch.no_grad():
        np.testing.assert_allclose(merged(**batch).logits, run.logits[:8], atol=1e-4)
        assert merged(**batch).loss.isfinite()


def test_what_no_head_of_numbers_can_do_is_refused(runs: Callable[[str], Run], tmp_path: Path) -> None:
    manifest = open_artifact(runs("label set").artifact, verify=False).manifest
    with pytest.raises(
        ConfigError, match=r"class-mean head needs one class a row; .* is multi_label_classification"
    ):
        class_head(manifest)
    model = save_classifier(tmp_path / "model")
    task = "sequence-classification"
    with pytest.raises(
        ExportError,
        match=r"backend ort-training trains one class a row; use onnx or executorch|use executorch",
    ):
        export(model, task=task, problem_type="regression", backend="ort-training", out=tmp_path / "a")
    with pytest.raises(ConfigError, match="no problem type 'ordinal'"):
        export(model, task=task, problem_type="ordinal", out=tmp_path / "a")
    with pytest.raises(ConfigError, match=r"--problem-type is for .*; the task is causal-lm"):
        export(model, task="causal-lm", problem_type="regression", out=tmp_path / "a")


@pytest.mark.slow
@pytest.mark.parametrize("given", ["balanced", "urgent=0.25,on=3"])
def test_losses_under_class_weights_are_those_of_torch(tmp_path: Path, classifier: Path, given: str) -> None:
    data, columns = write_rows(tmp_path / "rows.jsonl"), Columns(label_column="class")
    report = train(
        classifier, data=data, columns=columns, work=WORK, class_weights=given, out=tmp_path / "run"
    )
    manifest = open_artifact(classifier, verify=False).manifest
    dataset = load_dataset(data, manifest, classifier, seq_len=WORK.seq_len, columns=columns)
    weights = {"on": 3.0, "off": 1.0, "urgent": 0.25}
    if given == "balanced":
        classes = np.unique(dataset.labels)
        found = compute_class_weight("balanced", classes=classes, y=dataset.labels)
        weights |= {TAGS[i]: weight for i, weight in zip(classes, found, strict=True)}
    batches = [
        dataset.rows(rows)
        for epoch in range(WORK.epochs)
        for rows in dataset.epoch_batches(WORK.seed, epoch, WORK.batch_size)
    ]
    loss = torch.nn.CrossEntropyLoss(weight=torch.tensor([weights[tag] for tag in TAGS], dtype=torch.float32))
    expected, plain = (
        trained(in_transformers(classifier, tmp_path / "start"), batches, loss_of=of)
        for of in (loss, torch.nn.CrossEntropyLoss())
    )
    np.testing.assert_allclose(report.losses, expected, rtol=2e-5)
    assert np.abs(np.subtract(expected, plain)).max() > 0.01  # the weights matter here
    with pytest.raises(ConfigError, match=r"class_weights: .* there,  here"):
        train(classifier, data=data, columns=columns, work=WORK, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "num_labels", "config", "found"),
    [
        (None, None, {"id2label": {"0": "LABEL_0"}}, "regression"),
        (None, 3, {"id2label": {"0": "LABEL_0"}}, ""),
        (None, 3, {"id2label": dict.fromkeys("012"), "problem_type": LABEL_SETS}, LABEL_SETS),
        (None, 2, {"id2label": dict.fromkeys("012"), "problem_type": LABEL_SETS}, ""),
        (
            "single_label_classification",
            3,
            {"id2label": dict.fromkeys("012"), "problem_type": LABEL_SETS},
            "",
        ),
        ("regression", 3, {}, "regression"),
        (None, None, {}, ""),
    ],
)
def test_a_checkpoints_problem_type_is_kept_with_its_outputs(
    given: str | None, num_labels: int | None, config: dict[str, Any], found: str
) -> None:
    notes: list[str] = []
    task = "sequence-classification"
    assert choose_problem(given, task=task, num_labels=num_labels, config=config, tell=notes.append) == found
    assert len(notes) == (found != "" and given is None)  # what nobody asked for is told


@pytest.mark.parametrize("case", EACH[::2])
def test_plain_onnxruntime_answers_as_the_trained_model(runs: Callable[[str], Run], case: str) -> None:
    run = runs(case)
    out = merge(run.folder / "run", out=run.folder / "onnx", onnx=True, model=run.folder / "model")
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    assert {node.domain for node in onnx.load(out / "model.onnx").graph.node} == {
        ""
    }  # operators of ONNX alone
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    texts = [json.loads(line)["text"] for line in run.data.read_text().splitlines()]
    for some in (texts[:1], texts):
        given = tokenizer(some, return_tensors="np", padding=True)
        feeds = {one.name: given[one.name] for one in session.get_inputs()}
        np.testing.assert_allclose(session.run(["logits"], feeds)[0], run.logits[: len(some)], atol=1e-4)
    config = transformers.AutoConfig.from_pretrained(out)
    assert config.problem_type == CASES[case][0]["problem_type"] == read_provenance(out).problem_type
    with pytest.raises(ConfigError, match="give --full or --onnx, got both"):
        merge(run.folder / "run", out=run.folder / "both", onnx=True, full=True)
