"""How hard each row of a batch pulls at what learns: norms of its own part of the loss's gradient, which a step has at hand."""

from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.draws import Doubles


class Pulls(NamedTuple):
    """Of each row, float64 (B,); a row whose own loss is at its least pulls with 0."""

    body: Doubles
    """Norm of the gradient of the hidden stream that enters the head: whatever the layers learn of the row goes through it."""
    head: Doubles
    """Norm of the gradient of the logits."""


def pulls_of(logits: Array | None, labels: Array, d_hidden: Array | None) -> Pulls | None:
    """Measure the rows of a batch whose loss is a cross-entropy; None if there is nothing to measure.

    Args:
        logits: (B, C), for a head that answers once for a row; of any other the norms at the hidden stream stand for both.
        labels: (B,) int64.
        d_hidden: gradient of the mean loss at the hidden stream, (B, S, H) or other axes after the first; None: the norms at the
            logits stand for both.
    """
    found = [] if d_hidden is None else [_norms(d_hidden)]
    if logits is not None and logits.ndim == 2 and labels.ndim == 1:
        found.append(_at_logits(logits, labels))
    return Pulls(found[0], found[-1]) if found else None


def joined(parts: list[Pulls | None], weights: list[float]) -> Pulls | None:
    """Put the rows of parts behind each other, each part times its weight in the mean; None if one was not measured."""
    found = [Pulls(p.body * w, p.head * w) for p, w in zip(parts, weights, strict=True) if p is not None]
    if not found or len(found) < len(parts):
        return None
    return Pulls(np.concatenate([p.body for p in found]), np.concatenate([p.head for p in found]))


def _norms(gradient: Array) -> Doubles:
    flat = gradient.reshape(len(gradient), -1).astype(np.float64)
    return np.asarray(np.linalg.norm(flat, axis=1))


def _at_logits(logits: Array, labels: Array) -> Doubles:
    """||softmax(z) - y|| / B."""
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    p -= labels[:, None] == np.arange(p.shape[1])
    return np.asarray(np.linalg.norm(p, axis=1) / len(p))
