"""What a batch must be, a batch in parts that run one after the other, and the mean of what they come to."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.engine.pulls import Pulls, joined
from fleetune.device_runtime.engine.token_head import shifted
from fleetune.device_runtime.errors import ArtifactError

_BATCH, _SEQ = "batch", "seq"


class StepResult(NamedTuple):
    """``grads`` are float32 by tensor name, for the trained layers and the head.

    ``logits`` are None where the head works in chunks, unless they were asked for.
    """

    loss: float
    logits: Array | None
    grads: Arrays
    pulls: Pulls | None = None
    """How hard each row pulls at what learns; None where nothing measures it."""


class Part(NamedTuple):
    """Some rows of a batch."""

    place: slice
    """Which of them."""
    arrays: Arrays


class Mean:
    """The mean of parts; a part weighs as much as its own mean was taken over: see :func:`share_of`."""

    def __init__(self, total: float) -> None:
        """``total`` is the sum of what will be added."""
        self._total = total or 1
        self._loss = 0.0
        self._logits: list[Array] = []
        self._grads: Arrays = {}
        self._pulls: list[Pulls | None] = []
        self._weights: list[float] = []

    def add(self, part: StepResult, share: float) -> None:
        """Take a part in; one part alone comes out to the bit as it went in, one of no share adds nothing but its logits."""
        weight = share / self._total
        self._loss += weight * part.loss if share else 0.0
        self._logits += [] if part.logits is None else [part.logits]
        self._pulls.append(part.pulls)
        self._weights.append(weight)
        for name, grad in part.grads.items():
            scaled = _weighed(grad, weight)
            self._grads[name] = np.add(self._grads[name], scaled) if name in self._grads else scaled

    def result(self) -> StepResult:
        """The step as if its rows had run together."""
        logits = np.concatenate(self._logits) if len(self._logits) > 1 else next(iter(self._logits), None)
        return StepResult(self._loss, logits, self._grads, joined(self._pulls, self._weights))


def check_batch(batch: Arrays, inputs: Sequence[Input], *, bounds: Mapping[str, int]) -> None:
    """Names, dtypes and shapes of a batch against the manifest; symbols must agree across arrays and keep their bounds.

    Raises:
        ArtifactError: lists every difference.
    """
    problems = [
        f"{n}: not an input of this model" for n in sorted(batch.keys() - {row.name for row in inputs})
    ]
    symbols: dict[str, int] = {}
    for row in inputs:
        array = batch.get(row.name)
        if array is None:
            problems.append(f"{row.name}: missing")
        elif not row.fits(array, symbols):
            problems.append(f"{row.name}: expected {row}, got {array.dtype}{list(array.shape)}")
    problems += [f"{n} {e}: at most {bounds[n]}" for n, e in symbols.items() if e > bounds.get(n, e)]
    if problems:
        raise ArtifactError("batch does not fit the model: " + "; ".join(problems))


def parts(batch: Arrays, inputs: Sequence[Input], rows: Rows) -> list[list[Part]]:
    """Cut a batch into micro-batches, in order, and each into the parts that run at the same time."""
    size = num_rows(batch, inputs)
    together = rows.memory.together(size, num_tokens(batch, inputs), rows.lanes)
    return [
        [Part(place, pick(batch, inputs, place)) for place in _cut(group, -(-_length(group) // rows.lanes))]
        for group in _cut(slice(0, size), together)
    ]


def num_rows(batch: Arrays, inputs: Sequence[Input]) -> int:
    """Rows of a batch."""
    return next(int(batch[row.name].shape[0]) for row in inputs if row.shape[:1] == (_BATCH,))


def pick(batch: Arrays, inputs: Sequence[Input], rows: slice | Array) -> Arrays:
    """Some rows of a batch; arrays without a batch dimension stay whole."""
    return {
        row.name: batch[row.name][rows] if row.shape[:1] == (_BATCH,) else batch[row.name] for row in inputs
    }


def num_tokens(batch: Arrays, inputs: Sequence[Input]) -> int:
    """Tokens of a row, padding included; 0 where rows are no sequences."""
    rows = [row for row in inputs if _SEQ in row.shape and row.name in batch]
    return max((batch[row.name].shape[row.shape.index(_SEQ)] for row in rows), default=0)


def share_of(labels: Array, counted: Targets | None) -> int:
    """How many a mean loss is taken over: rows of ``labels``, or those of them that have a target."""
    return len(labels) if counted is None else int((shifted(labels, counted) != counted.ignored).sum())


def _weighed(grad: Array, weight: float) -> Array:
    """``grad`` times ``weight``; at 0 a zero, for the mean over no label at all may be NaN."""
    if weight == 0:
        return np.zeros_like(grad)
    return grad if weight == 1 else np.multiply(grad, np.float32(weight))


def _cut(place: slice, length: int) -> list[slice]:
    """``place`` in pieces of at most ``length``."""
    return [slice(i, min(i + length, place.stop)) for i in range(place.start, place.stop, max(1, length))]


def _length(place: slice) -> int:
    return int(place.stop - place.start)
