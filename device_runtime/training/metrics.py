"""Figures of a classifier from how often each class was answered for each, by scikit-learn's definitions; 0 of nothing is 0.

Only counts are kept, however many samples there are: K classes take K * K int64, and of more than CLASSES_MAX three times K.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Indices

Doubles = NDArray[np.float64]
CLASSES_MAX = 1024
"""Of more classes no matrix is kept: it would take more than 8 MB."""


class ByClass(NamedTuple):
    """Precision, recall and F1 of K classes, float64 (K,), and their support; see :class:`Metrics`."""

    precision: Doubles
    recall: Doubles
    f1: Doubles
    support: Indices


class Metrics(NamedTuple):
    """Figures of K classes."""

    accuracy: float
    """Share of right answers."""
    balanced_accuracy: float
    """Mean recall of the classes that a label names."""
    macro_f1: float
    """Mean F1 of the classes that a label or an answer names."""
    precision: Doubles
    """Float64 (K,), as recall and F1: the share of a class's answers that are right; 0 of a class that is never answered."""
    recall: Doubles
    """The share of a class's labels that are answered right; 0 of a class without labels."""
    f1: Doubles
    support: Indices
    """Int64 (K,): labels of each class."""

    @property
    def by_class(self) -> ByClass:
        """What is of single classes."""
        return ByClass(self.precision, self.recall, self.f1, self.support)


class Confusion:
    """Answers counted by class as they come."""

    def __init__(self, num_classes: int) -> None:
        """Begin at 0; a matrix is kept of at most CLASSES_MAX classes."""
        self._num_classes = num_classes
        self.matrix: Indices | None = None
        """Int64 (K, K): labels down, answers across; None of too many classes."""
        if num_classes <= CLASSES_MAX:
            self.matrix = np.zeros((num_classes, num_classes), np.int64)
        self._right, self._support, self._answered = np.zeros((3, num_classes), np.int64)

    def add(self, answers: Indices, labels: Indices) -> None:
        """Count answers, int64 (N,), against labels (N,); a label that is no class counts for nothing."""
        is_class = (labels >= 0) & (labels < self._num_classes)
        answers, labels = answers[is_class], labels[is_class]
        self._right += self._counts(labels[answers == labels])
        self._support += self._counts(labels)
        self._answered += self._counts(answers)
        if self.matrix is not None:
            np.add.at(self.matrix, (labels, answers), 1)

    def metrics(self) -> Metrics:
        """Figures of what was counted."""
        return _metrics(self._right, self._support, self._answered)

    def _counts(self, classes: Indices) -> Indices:
        return np.bincount(classes, minlength=self._num_classes)


def metrics_of(confusion: Indices) -> Metrics:
    """Return the figures of a confusion matrix, int64 (K, K): labels down, answers across.

    Source: accuracy_score, balanced_accuracy_score, precision_recall_fscore_support (zero_division=0) and f1_score
    (average="macro", zero_division=0) of scikit-learn.
    """
    return _metrics(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))


def _metrics(right: Indices, support: Indices, answered: Indices) -> Metrics:
    """Figures from int64 (K,) each: right answers, labels and answers by class."""
    recall, precision = shares(right, support), shares(right, answered)
    f1 = shares(2 * right, support + answered)
    return Metrics(
        accuracy=float(shares(right.sum(), support.sum())),
        balanced_accuracy=_mean(recall[support > 0]),
        macro_f1=_mean(f1[support + answered > 0]),
        precision=precision,
        recall=recall,
        f1=f1,
        support=support,
    )


def shares(part: Indices, whole: Indices) -> Doubles:
    """Part of whole, element by element; 0 where there is nothing."""
    return np.divide(part, np.maximum(whole, 1))


def _mean(values: Doubles) -> float:
    return float(values.mean()) if values.size else 0.0
