"""Figures of answers that are sets of labels, by scikit-learn's definitions; 0 of nothing is 0.

A label is answered at a logit above 0.

Shapes: N rows, K labels.
"""

from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Indices
from fleetune.device_runtime.training.metrics import ByClass, shares


class LabelSetMetrics(NamedTuple):
    """Figures of K labels."""

    exact_match: float
    """Share of rows whose labels are all answered, and no other."""
    micro_f1: float
    """F1 of all labels of all rows together."""
    macro_f1: float
    """Mean F1 of the labels, those that no row has too."""
    by_class: ByClass


class LabelSets:
    """Answers counted by label as they come."""

    def __init__(self, num_labels: int) -> None:
        """Begin at 0."""
        self._rows, self._exact = 0, 0
        self._right, self._support, self._answered = np.zeros((3, num_labels), np.int64)

    def add(self, answers: Array, labels: Array) -> None:
        """Count logits (N, K) against zeros and ones (N, K)."""
        answered, wanted = np.asarray(answers, np.float32) > 0, np.asarray(labels, np.float32) > 0
        self._rows += len(wanted)
        self._exact += int((answered == wanted).all(1).sum())
        self._right += (answered & wanted).sum(0)
        self._support += wanted.sum(0)
        self._answered += answered.sum(0)

    def metrics(self) -> LabelSetMetrics:
        """Figures of what was counted.

        Source: accuracy_score, f1_score (average="micro", "macro") and precision_recall_fscore_support of scikit-learn, of
        indicator matrices, zero_division=0.
        """
        right, support, answered = self._right, self._support, self._answered
        f1 = shares(2 * right, support + answered)
        micro = shares(_total(2 * right), _total(support + answered))
        by_class = ByClass(shares(right, answered), shares(right, support), f1, support)
        return LabelSetMetrics(self.score, float(micro[0]), float(f1.mean()), by_class)

    @property
    def score(self) -> float:
        """Share of rows that are answered exactly."""
        return self._exact / max(1, self._rows)


def _total(counts: Indices) -> Indices:
    return np.array([counts.sum()])
