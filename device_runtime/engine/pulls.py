"""How hard each row of a batch pulls at what learns: norms of its own part of the loss's gradient, which a step has at hand."""

import math
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.contracts.manifest import ProblemType
from fleetune.device_runtime.draws import Doubles


class Pulls(NamedTuple):
    """Of each row, float64 (B,); a row whose own loss is at its least pulls with 0."""

    body: Doubles
    """Norm of the gradient of the hidden stream that enters the head: whatever the layers learn of the row goes through it."""
    head: Doubles
    """Norm of the gradient of the logits."""


def pulls_of(
    logits: Array | None,
    labels: Array,
    d_hidden: Array | None,
    *,
    problem_type: ProblemType = "",
    weights: Floats | None = None,
) -> Pulls | None:
    """Measure the rows of a batch; None if there is nothing to measure.

    Args:
        logits: (B, C), for a head that answers once for a row; of any other the norms at the hidden stream stand for both.
        labels: (B,) int64; numbers, (B,) or (B, C), or zeros and ones (B, C), float32, of the other problem types.
        d_hidden: gradient of the mean loss at the hidden stream, (B, S, H) or other axes after the first; None: the norms at the
            logits stand for both.
        problem_type: whose loss it is: empty for a cross-entropy, else a squared error or a binary cross-entropy.
        weights: of the classes, in a cross-entropy (C,); None for all alike.
    """
    found = [] if d_hidden is None else [_norms(d_hidden)]
    if logits is not None and logits.ndim == 2 and problem_type:
        found.append(_at_outputs(logits, labels, problem_type))
    elif logits is not None and logits.ndim == 2 and labels.ndim == 1:
        found.append(_at_logits(logits, labels, weights))
    return Pulls(found[0], found[-1]) if found else None


def sigmoid(z: Doubles) -> Doubles:
    """1 / (1 + e^-z), element by element; of any z without overflow."""
    found: Doubles = 0.5 * (1 + np.tanh(z / 2))
    return found


def joined(parts: list[Pulls | None], weights: list[float]) -> Pulls | None:
    """Put the rows of parts behind each other, each part times its weight in the mean; None if one was not measured."""
    found = [Pulls(p.body * w, p.head * w) for p, w in zip(parts, weights, strict=True) if p is not None]
    if not found or len(found) < len(parts):
        return None
    return Pulls(np.concatenate([p.body for p in found]), np.concatenate([p.head for p in found]))


def _norms(gradient: Array) -> Doubles:
    """In float64, row by row: squares of float32 vanish below 1e-23, and the aggregator picks the scale."""
    return np.array([math.sqrt(float(np.square(row, dtype=np.float64).sum())) for row in gradient])


def _at_logits(logits: Array, labels: Array, weights: Floats | None) -> Doubles:
    """||softmax(z) - y|| / B; with class weights ||softmax(z) - y|| w_y / the sum of all w_y."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p -= labels[:, None] == np.arange(p.shape[1])
    norms = np.linalg.norm(p, axis=1)
    if weights is None:
        return np.asarray(norms / len(p))
    own = weights[labels].astype(np.float64)
    return np.asarray(norms * own / (own.sum() or 1.0))


def _at_outputs(logits: Array, labels: Array, problem_type: ProblemType) -> Doubles:
    """2 ||z - y|| / (B K) of a squared error, ||sigmoid(z) - y|| / (B K) of a binary cross-entropy."""
    z, y = logits.astype(np.float64), labels.reshape(logits.shape).astype(np.float64)
    slopes = 2 * (z - y) if problem_type == "regression" else sigmoid(z) - y
    return np.asarray(np.linalg.norm(slopes, axis=1) / z.size)
