"""A head that works token by token, a few rows at a time: logits of batch x sequence x vocabulary never exist whole.

Its graphs take any rows of tokens as a batch of one; ``train`` returns the sum of their losses and the gradients of that sum.
Rows without a target are not run at all, unless their logits are asked for.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import LEAST_TOKENS, LOGITS_BYTES, Targets

Rows = NDArray[np.int64]
RunChunk = Callable[[Array, Array], tuple[float, Arrays]]
"""(hidden (1, rows, width), targets (1, rows)) -> sum of losses, and arrays by name: logits, d_hidden, gradients."""


class HeadResult(NamedTuple):
    """Mean loss; ``answers`` as of :meth:`Engine.evaluate`; arrays that nobody asked for are None or missing."""

    loss: float
    answers: Array
    logits: Array | None
    d_hidden: Array | None
    grads: Arrays


def run_tokens(
    run: RunChunk,
    hidden: Array,
    labels: Array,
    *,
    targets: Targets,
    num_classes: int,
    keep_logits: bool = False,
    backward: bool = True,
    logits_bytes: int = LOGITS_BYTES,
) -> HeadResult:
    """Run the head over all tokens that have a target.

    Args:
        run: the graph.
        hidden: (batch, seq, width).
        labels: (batch, seq), as in the data.
        targets: how labels become targets.
        num_classes: width of the logits; sets how many rows are run at a time.
        keep_logits: return the whole logits (batch, seq, num_classes), rows without target included.
        backward: return the gradient of ``hidden``.
        logits_bytes: of the logits that exist at a time.
    """
    wanted = shifted(labels, targets).reshape(1, -1)
    flat = hidden.reshape(1, wanted.size, -1)
    counted = np.flatnonzero(wanted[0] != targets.ignored)
    scale = np.float32(1 / max(1, len(counted)))
    answers = np.zeros(wanted.size, np.int64)
    logits = np.empty((wanted.size, num_classes), np.float32) if keep_logits else None
    gradient = np.zeros_like(flat) if backward else None
    losses: list[float] = []
    grads: Arrays = {}

    def take(chunk: Rows) -> None:
        """Run a chunk; when this returns, nothing of it is left but what was asked for."""
        summed, found = run(flat[:, chunk], wanted[:, chunk])
        losses.append(summed)
        part, slope = found.pop("logits")[0], found.pop("d_hidden")
        answers[chunk] = part.argmax(-1)
        if logits is not None:
            logits[chunk] = part
        if gradient is not None:
            gradient[:, chunk] = np.multiply(slope, scale)
        for name, gained in found.items():
            grads[name] = np.add(grads.get(name, 0), np.multiply(gained, scale))

    rows = np.arange(wanted.size) if keep_logits or not len(counted) else counted
    for chunk in chunks(rows, num_classes, logits_bytes):
        take(chunk)
    return HeadResult(
        sum(losses) * float(scale),
        answers.reshape(labels.shape),
        None if logits is None else logits.reshape(*labels.shape, num_classes),
        None if gradient is None else gradient.reshape(hidden.shape),
        grads,
    )


def shifted(labels: Array, targets: Targets) -> Array:
    """Labels, (batch, seq) or (batch,), moved ``targets.shift`` places to the left: each token's own target at its place."""
    moved = np.full_like(labels, targets.ignored)
    moved[..., : labels.shape[-1] - targets.shift] = labels[..., targets.shift :]
    return moved


def chunk_bytes(num_classes: int, *, lanes: int, logits_bytes: int = LOGITS_BYTES) -> int:
    """Bytes of the logits that exist at a time on each lane."""
    return max(logits_bytes // lanes, 4 * LEAST_TOKENS * num_classes)


def chunks(rows: Rows, num_classes: int, logits_bytes: int = LOGITS_BYTES) -> Iterator[Rows]:
    """``rows`` in parts whose logits stay under ``logits_bytes``."""
    size = max(1, logits_bytes // (4 * num_classes))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
