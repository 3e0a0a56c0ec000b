"""Figures of numbers and of label sets against scikit-learn's, however the rows come; and the score that travels as accuracy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sklearn.metrics

from fleetune.device_runtime.commands.evaluating import described
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.training.evaluation import Evaluation, evaluate
from fleetune.device_runtime.training.label_sets import LabelSets
from fleetune.device_runtime.training.regression import Regression


def rows(num_rows: int, num_outputs: int, *, shift: float = 0.0) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    labels = rng.normal(size=(num_rows, num_outputs)) + shift
    return labels + 0.4 * rng.normal(size=labels.shape), labels


@pytest.mark.parametrize("parts", [1, 3, 40])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_regression_in_parts_is_scikit_learns_of_the_whole(parts: int, shift: float) -> None:
    answers, labels = rows(40, 3, shift=shift)
    found = Regression(3)
    for some in np.array_split(np.arange(40), parts):
        found.add(answers[some], labels[some])
    figures, raw = found.figures(), {"multioutput": "raw_values"}
    np.testing.assert_allclose(figures.mse, sklearn.metrics.mean_squared_error(labels, answers, **raw))
    np.testing.assert_allclose(figures.mae, sklearn.metrics.mean_absolute_error(labels, answers, **raw))
    np.testing.assert_allclose(figures.r2, sklearn.metrics.r2_score(labels, answers, **raw), rtol=1e-6)
    expected = [np.corrcoef(answers[:, i], labels[:, i])[0, 1] for i in range(3)]
    np.testing.assert_allclose(figures.pearson, expected, rtol=1e-6)
    assert found.score == pytest.approx(sklearn.metrics.r2_score(labels, answers), rel=1e-6)


def test_what_does_not_differ_has_no_r2_and_the_score_0() -> None:
    constant = Regression(1)
    constant.add(np.array([[1.0], [2.0]]), np.array([3.0, 3.0]))
    assert np.isnan(constant.figures().r2).all()
    assert np.isnan(constant.figures().pearson).all()
    worse = Regression(1)
    worse.add(np.array([[9.0], [-9.0]]), np.array([0.0, 1.0]))
    assert worse.figures().r2[0] < 0
    assert constant.score == worse.score == Regression(1).score == 0
    file = described(Evaluation(2.5, 0.0, 2), constant, SimpleNamespace(labels=("value",)), data="rows.csv")
    assert (file.accuracy, file.r2, file.pearson, file.mae, file.loss) == (None, None, None, 1.5, 2.5)


@pytest.mark.parametrize("parts", [1, 4])
def test_label_sets_in_parts_are_scikit_learns_of_the_whole(parts: int) -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(30, 4)), (rng.random((30, 4)) < 0.4).astype(np.float32)
    labels[:, 3] = 0  # a label that no row has
    logits[:5] = np.where(labels[:5] > 0, 1, -1)
    found = LabelSets(4)
    for some in np.array_split(np.arange(30), parts):
        found.add(logits[some], labels[some])
    metrics, answers = found.metrics(), logits > 0
    assert metrics.exact_match == found.score == sklearn.metrics.accuracy_score(labels, answers) >= 5 / 30
    for kind, value in (("micro", metrics.micro_f1), ("macro", metrics.macro_f1)):
        expected = sklearn.metrics.f1_score(labels, answers, average=kind, zero_division=0)
        assert value == pytest.approx(expected)
    by_class = sklearn.metrics.precision_recall_fscore_support(labels, answers, zero_division=0)
    np.testing.assert_allclose(metrics.by_class, by_class)


@pytest.mark.parametrize(
    ("problem", "answers", "labels", "score"),
    [
        ("regression", [[0.0], [1.0], [2.0], [4.0]], [0, 1, 2, 3], 0.8),
        ("multi_label_classification", [[1, -1], [1, 1], [-1, -1]], [[1, 0], [1, 1], [1, 0]], 2 / 3),
    ],
)
def test_what_an_evaluation_reports_is_a_score_from_0_to_1(
    problem: str, answers: Any, labels: Any, score: float
) -> None:
    answers, labels = np.array(answers, np.float32), np.array(labels, np.float32)
    outputs = ("value",) if labels.ndim == 1 else ("a", "b")
    manifest = SimpleNamespace(counted=None, label_name="labels", problem_type=problem, labels=outputs)
    engine = SimpleNamespace(
        artifact=SimpleNamespace(manifest=manifest),
        rows=lambda *_: None,
        evaluate=lambda batch, adapter, rows: (1.0, answers[batch["place"]]),
    )
    columns = {"labels": Dense(labels), "place": Dense(np.arange(len(labels)))}
    dataset = make_dataset(
        columns, np.ones(len(labels), np.int64), seq_len=1, num_classes=2, label_name="labels"
    )
    found = evaluate(engine, dataset, {}, batch_size=3)
    assert found == (1.0, pytest.approx(score), len(labels))
