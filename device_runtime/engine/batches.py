"""What a batch must be, a batch in parts that run one after the other, and the mean of what they come to."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.manifest import Input, Targets
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


class Part(NamedTuple):
    """Some rows of a batch."""

    rows: slice
    """Their place in it."""
    batch: Arrays

    @property
    def size(self) -> int:
        """How many rows."""
        return int(self.rows.stop - self.rows.start)

    def within(self, whole: "Part") -> "Part":
        """A part of a part, with its place in the batch."""
        first = whole.rows.start
        return Part(slice(first + self.rows.start, first + self.rows.stop), self.batch)


class Mean:
    """The mean of parts; a part weighs as many rows, or target tokens, as its own mean was taken over."""

    def __init__(self, total: int) -> None:
        """``total`` is the sum of what will be added."""
        self._total = max(1, total)
        self._loss = 0.0
        self._logits: list[Array] = []
        self._grads: Arrays = {}

    def add(self, part: StepResult, share: int) -> None:
        """Take a part in; one part alone comes out to the bit as it went in."""
        weight = share / self._total
        self._loss += weight * part.loss
        self._logits += [] if part.logits is None else [part.logits]
        for name, grad in part.grads.items():
            scaled = grad if weight == 1 else np.multiply(grad, np.float32(weight))
            self._grads[name] = np.add(self._grads[name], scaled) if name in self._grads else scaled

    def result(self) -> StepResult:
        """The step as if its rows had run together."""
        logits = np.concatenate(self._logits) if len(self._logits) > 1 else next(iter(self._logits), None)
        return StepResult(self._loss, logits, self._grads)


def check_batch(batch: Arrays, rows: Sequence[Input], *, bounds: Mapping[str, int]) -> None:
    """Names, dtypes and shapes of a batch against the manifest; symbols must agree across arrays and keep their bounds.

    Raises:
        ArtifactError: lists every difference.
    """
    problems = [f"{n}: not an input of this model" for n in sorted(batch.keys() - {row.name for row in rows})]
    symbols: dict[str, int] = {}
    for row in rows:
        array = batch.get(row.name)
        if array is None:
            problems.append(f"{row.name}: missing")
        elif array.dtype != np.dtype(row.dtype) or not _fits(array.shape, row.shape, symbols):
            want = f"{row.dtype}[{', '.join(map(str, row.shape))}]"
            problems.append(f"{row.name}: expected {want}, got {array.dtype}{list(array.shape)}")
    problems += [f"{n} {e}: at most {bounds[n]}" for n, e in symbols.items() if e > bounds.get(n, e)]
    if problems:
        raise ArtifactError("batch does not fit the model: " + "; ".join(problems))


def split(batch: Arrays, inputs: Sequence[Input], rows: int) -> Iterator[Part]:
    """Parts of at most ``rows`` rows, 0 for all."""
    size = next(batch[row.name].shape[0] for row in inputs if row.shape[:1] == (_BATCH,))
    for start in range(0, size, rows or size):
        place = slice(start, min(start + (rows or size), size))
        yield Part(place, pick(batch, inputs, place))


def pick(batch: Arrays, inputs: Sequence[Input], rows: slice | Array) -> Arrays:
    """Some rows of a batch; arrays without a batch dimension stay whole."""
    return {
        row.name: batch[row.name][rows] if row.shape[:1] == (_BATCH,) else batch[row.name] for row in inputs
    }


def num_tokens(batch: Arrays, inputs: Sequence[Input]) -> int:
    """Tokens of a row, padding included; 0 where rows are no sequences."""
    rows = [row for row in inputs if _SEQ in row.shape and row.name in batch]
    return max((batch[row.name].shape[row.shape.index(_SEQ)] for row in rows), default=0)


def share_of(batch: Mapping[str, Array], targets: Targets | None) -> int:
    """What the mean loss of ``batch`` is taken over: rows, or tokens that have a target."""
    labels = batch["labels"]
    return len(labels) if targets is None else int((shifted(labels, targets) != targets.ignored).sum())


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], symbols: dict[str, int]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(
        extent == (symbols.setdefault(w, extent) if isinstance(w, str) else w)
        for extent, w in zip(shape, wanted, strict=True)
    )
