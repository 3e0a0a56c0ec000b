"""Figures of a regression, by scikit-learn's definitions, from sums that are kept as answers come.

Shapes: N rows, K outputs. Means and sums of squares are merged part by part (Chan, Golub and LeVeque, 1979): a large mean takes
nothing from a small spread.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array

Doubles = NDArray[np.float64]


class RegressionFigures(NamedTuple):
    """Figures of K outputs, float64 (K,) each; R2 and Pearson's r are NaN where labels, or answers, do not differ."""

    mse: Doubles
    mae: Doubles
    r2: Doubles
    pearson: Doubles


class Regression:
    """Errors and moments of answers and labels, summed as they come."""

    def __init__(self, num_outputs: int) -> None:
        """Begin at 0."""
        self._count = 0
        self._squared, self._absolute = np.zeros((2, num_outputs))
        self._means = np.zeros((2, num_outputs))
        """Of answers, and of labels."""
        self._spreads = np.zeros((3, num_outputs))
        """Sums of squares around the means, of answers and of labels, and of their products."""

    def add(self, answers: Array, labels: Array) -> None:
        """Take in answers (N, K) and labels, (N, K) or (N,) of one output."""
        y = np.asarray(answers, np.float64)
        t = np.asarray(labels, np.float64).reshape(y.shape)
        if not len(y):
            return
        self._squared += np.square(y - t).sum(0)
        self._absolute += np.abs(y - t).sum(0)
        means = np.stack([y.mean(0), t.mean(0)])
        dy, dt = y - means[0], t - means[1]
        before, self._count = self._count, self._count + len(y)
        shift, share = means - self._means, len(y) / self._count
        between = before * share * np.stack([shift[0] ** 2, shift[1] ** 2, shift[0] * shift[1]])
        self._spreads += np.stack([(dy**2).sum(0), (dt**2).sum(0), (dy * dt).sum(0)]) + between
        self._means += shift * share

    def figures(self) -> RegressionFigures:
        """Figures of what was added."""
        of_answers, of_labels, of_both = self._spreads
        count = max(1, self._count)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = np.where(of_labels > 0, 1 - self._squared / of_labels, np.nan)
            both = np.sqrt(of_answers) * np.sqrt(of_labels)
            pearson = np.where(both > 0, np.clip(of_both / both, -1, 1), np.nan)
        return RegressionFigures(self._squared / count, self._absolute / count, r2, pearson)

    @property
    def score(self) -> float:
        """Mean R2 of the outputs, from 0, no better than the mean of the labels, to 1; 0 where it cannot be told."""
        mean = float(self.figures().r2.mean())
        return max(0.0, mean) if np.isfinite(mean) else 0.0
