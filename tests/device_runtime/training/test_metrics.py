"""Figures of a confusion matrix, worked by hand and as scikit-learn has them."""

import warnings

import numpy as np
import pytest

from fleetune.device_runtime.training import metrics
from fleetune.device_runtime.training.metrics import Confusion, metrics_of


def test_three_classes_worked_by_hand():
    found = metrics_of(np.array([[2, 1, 0], [0, 3, 1], [1, 0, 0]]))
    assert found.accuracy == 5 / 8
    assert found.recall.tolist() == [2 / 3, 3 / 4, 0]
    assert found.precision.tolist() == [2 / 3, 3 / 4, 0]
    assert found.f1.tolist() == pytest.approx([2 / 3, 3 / 4, 0])
    assert found.balanced_accuracy == found.macro_f1 == pytest.approx((2 / 3 + 3 / 4) / 3)
    assert found.support.tolist() == [3, 4, 1]


def test_labels_are_rows_and_answers_are_columns():
    """Of two labelled 0 one is answered 1; the only label 1 is answered 1."""
    counted = Confusion(2)
    counted.add(np.array([0, 1, 1]), np.array([0, 0, 1]))
    assert counted.matrix.tolist() == [[1, 1], [0, 1]]
    found = counted.metrics()
    assert (found.recall.tolist(), found.precision.tolist()) == ([0.5, 1], [1, 0.5])
    assert (found.balanced_accuracy, found.macro_f1) == (0.75, pytest.approx(2 / 3))


def test_a_class_that_nobody_names_has_no_say_and_one_without_labels_is_no_recall():
    """Class 2 is neither labelled nor answered, class 1 is answered alone."""
    found = metrics_of(np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]]))
    assert found.macro_f1 == pytest.approx((2 / 3 + 0) / 2)
    assert found.balanced_accuracy == 0.5


def test_nothing_is_0():
    found = Confusion(3).metrics()
    assert (found.accuracy, found.balanced_accuracy, found.macro_f1) == (0, 0, 0)
    assert found.f1.tolist() == [0, 0, 0]


def test_a_label_that_is_no_class_counts_for_nothing():
    counted = Confusion(2)
    counted.add(np.array([0, 1, 1]), np.array([0, -100, 2]))
    assert counted.matrix.tolist() == [[1, 0], [0, 0]]


def test_batches_make_no_difference_and_neither_does_a_matrix_that_is_not_kept(monkeypatch):
    rng = np.random.default_rng(0)
    answers, labels = rng.integers(0, 5, (2, 300))
    whole, parts = Confusion(5), Confusion(5)
    whole.add(answers, labels)
    monkeypatch.setattr(metrics, "CLASSES_MAX", 4)
    bare = Confusion(5)
    for part in np.array_split(np.arange(300), 7):
        parts.add(answers[part], labels[part])
        bare.add(answers[part], labels[part])
    assert np.array_equal(whole.matrix, parts.matrix)
    assert bare.matrix is None
    for one, other in zip(bare.metrics(), metrics_of(whole.matrix), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize("missing", [(), (3,), (0, 4)])
def test_they_are_what_scikit_learn_says(missing):
    sk = pytest.importorskip("sklearn.metrics", exc_type=ImportError)
    rng = np.random.default_rng(len(missing))
    labels = rng.choice([c for c in range(6) if c not in missing], 200)
    answers = np.where(rng.random(200) < 0.6, labels, rng.choice([c for c in range(6) if c != 4], 200))
    counted = Confusion(6)
    counted.add(answers, labels)
    found = counted.metrics()
    everything = {"labels": range(6), "zero_division": 0}
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, answers, **everything)
    assert np.array_equal(counted.matrix, sk.confusion_matrix(labels, answers, labels=range(6)))
    assert found.precision == pytest.approx(precision)
    assert found.recall == pytest.approx(recall)
    assert found.f1 == pytest.approx(f1)
    assert found.support.tolist() == support.tolist()
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, answers))
    assert found.macro_f1 == pytest.approx(sk.f1_score(labels, answers, average="macro", zero_division=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes that have no labels
        assert found.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, answers))
