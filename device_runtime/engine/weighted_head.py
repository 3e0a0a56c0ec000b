"""A head whose loss is a weighted mean over labels, from graphs that know the plain mean alone.

The labels of one weight are a batch of their own to the head: the others are IGNORED, and the means are put together. So the
graphs stay as they are, and what lies below the head runs once. It is exact: the weighted mean is one of these means.

Shapes: B rows, C classes; labels (B,) or (B, S).
"""

from collections.abc import Callable

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.contracts.manifest import Targets
from fleetune.device_runtime.engine.token_head import HeadResult

Run = Callable[[Array], HeadResult]
"""Labels -> the head on them; the hidden stream is the same at every call."""


def run_weighted(run: Run, labels: Array, weights: Floats, counted: Targets) -> HeadResult:
    """Run the head once for each weight that a label of the batch has.

    Args:
        run: the head.
        labels: int64, as in the batch.
        weights: of the classes, float32 (C,), above 0.
        counted: which labels have a say.
    """
    of_label = label_weights(labels, weights, counted)
    values = np.unique(of_label[of_label > 0])
    if len(values) < 2:
        return run(labels)
    total = float(of_label.sum(dtype=np.float64))
    found: HeadResult | None = None
    for value in values.tolist():
        is_of = of_label == np.float32(value)
        share = value * int(is_of.sum()) / total
        part = run(np.where(is_of, labels, counted.ignored).astype(labels.dtype))
        found = _joined(found, part, np.float32(share))
    assert found is not None
    return found


def label_weights(labels: Array, weights: Floats, counted: Targets) -> Floats:
    """Return the weight of each label, float32 of their shape; 0 of those that have no say."""
    has_say = labels != counted.ignored
    found: Floats = np.where(has_say, weights[np.where(has_say, labels, 0)], np.float32(0))
    return found


def _joined(before: HeadResult | None, part: HeadResult, share: np.float32) -> HeadResult:
    scaled = HeadResult(
        part.loss * float(share),
        part.answers,
        part.logits,
        None if part.d_hidden is None else np.multiply(part.d_hidden, share),
        {name: np.multiply(grad, share) for name, grad in part.grads.items()},
    )
    if before is None:
        return scaled
    return HeadResult(
        before.loss + scaled.loss,
        before.answers,
        before.logits,
        None
        if before.d_hidden is None or scaled.d_hidden is None
        else np.add(before.d_hidden, scaled.d_hidden),
        {name: np.add(before.grads[name], grad) for name, grad in scaled.grads.items()},
    )
