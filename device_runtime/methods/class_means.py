"""The head of a classifier from class means: the nearest mean wins, by logits that a cross entropy can go on from.

Source: FedNCM, arXiv 2306.03937: means by class from sums and counts, exact in one federated round. The scale of the logits, and
what stands for a class without samples, are ours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead
from fleetune.device_runtime.errors import ConfigError

Doubles = NDArray[np.float64]

ABSENT = 0.5
"""How likely a class without samples is, where its logit is that of the mean of all, beside one with samples."""
_SPREAD_MIN = 0.01
"""Least variance within the classes, as a share of that of all samples: doubled samples promise nothing."""


class _Scatter(NamedTuple):
    """How samples lie: ``mean`` (D,) of all, and ``apart`` (C, D), each class's mean less that; 0 without samples."""

    mean: Doubles
    apart: Doubles
    counts: Doubles
    within: float
    """Variance of a sample about its class's mean, over all D together."""
    total: float
    """About the mean of all."""


def class_mean_head(sums: Arrays, head: ClassHead) -> Arrays:
    """Make the tensors of ``head``, float32: softmax of s (m_c . x - |m_c|^2 / 2), less what all classes have in common.

    That is the classifier of classes with means m_c and one variance 1/s in each direction that tells them apart. Their number is
    taken for the participation ratio of the means' scatter, 1/s for the variance within the classes shared among so many. All D
    directions would give logits far too sure of themselves.

    A class without samples has the mean of all for its own, and counts half. Without a bias the mean of all carries it.

    Args:
        sums: ``SUMS`` (C, D), ``COUNTS`` (C,) and ``SQUARES`` (C,), of at least one sample.
        head: names.

    Raises:
        ConfigError: no sample has a class.
    """
    if not sums[COUNTS].sum() > 0:
        raise ConfigError("a class-mean head needs samples: none has a class")
    scatter = _scatter(sums)
    mean, apart = scatter.mean, scatter.apart
    scale = _scale(scatter)
    weight = scale * apart  # (C, D)
    at_mean = -scale * np.square(apart).sum(1) / 2 + np.where(scatter.counts > 0, 0.0, np.log(ABSENT))  # (C,)
    bias = at_mean - weight @ mean
    if head.bias:
        return {head.weight: weight.astype(np.float32), head.bias: bias.astype(np.float32)}
    carried = np.outer(bias, mean) / (mean @ mean + 1 / scale) if scale else np.zeros_like(weight)
    return {head.weight: (weight + carried).astype(np.float32)}


def _scatter(sums: Arrays) -> _Scatter:
    counts = np.asarray(sums[COUNTS], np.float64)
    totals = np.asarray(sums[SUMS], np.float64)
    number, seen = counts.sum(), counts > 0
    mean = totals.sum(0) / number
    means = totals / np.where(seen, counts, 1.0)[:, None]  # of a class whose weight is cut, less than one
    apart = np.where(seen[:, None], means - mean, 0.0)
    squares = float(np.sum(sums[SQUARES]))
    about_means = max(0.0, squares - float(counts @ np.square(means).sum(1)))
    total = max(0.0, squares / number - float(mean @ mean))
    free = number - seen.sum()
    return _Scatter(mean, apart, counts, about_means / free if free else total, total)


def _scale(scatter: _Scatter) -> float:
    """1 over the variance in one direction that tells classes apart; 0 where nothing does."""
    spread = np.sqrt(scatter.counts)[:, None] * scatter.apart  # (C, D)
    gram = spread @ spread.T if len(spread) < spread.shape[1] else spread.T @ spread
    between = float(np.trace(gram))
    if not between > _NOTHING * scatter.counts.sum() * float(scatter.mean @ scatter.mean):
        return 0.0
    directions = between**2 / float(np.square(gram).sum())
    number, classes = float(scatter.counts.sum()), int((scatter.counts > 0).sum())
    within = max(scatter.within, _SPREAD_MIN * scatter.total) * (1 + classes / number)
    return directions / within


_NOTHING = 1e-10
"""Scatter of the means below this share of their square is rounding."""
