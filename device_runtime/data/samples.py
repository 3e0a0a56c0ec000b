"""Samples as a device holds them: compact rows, cut into padded batches by (seed, epoch) and nothing else."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.accounting import num_steps
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError

IGNORED = -100
"""Label of a position that has no say in the loss, as in torch."""

_WIDTH_MULTIPLE = 8
_WINDOW_BATCHES = 32


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, one after the other; a batch is padded with ``pad`` to (batch, width)."""

    values: Array
    lengths: Indices
    pad: float
    dtype: str

    def take(self, indices: Indices, width: int) -> Array:
        """Rows as one array (batch, width)."""
        starts = (np.cumsum(self.lengths) - self.lengths)[indices]
        inside = np.arange(width) < self.lengths[indices, None]
        filled: Array = np.full(inside.shape, self.pad, self.dtype)
        filled[inside] = self.values[(starts[:, None] + np.arange(width))[inside]]
        return filled


@dataclass(frozen=True)
class Dense:
    """Rows of one shape, (num_samples, …)."""

    values: Array

    def take(self, indices: Indices, width: int) -> Array:
        """Rows as one array (batch, …)."""
        return self.values[indices]


Column = Ragged | Dense


class Cut(NamedTuple):
    """What is not read of a data set because its texts are too long."""

    source: str
    """The file."""
    num_cut: int
    num_samples: int
    tokens_lost: int
    tokens: int
    """Of all texts, uncut."""
    length: int
    """To which texts are cut, in tokens."""
    length_max: int
    """That the model takes."""
    unit: str = "tokens"
    num_unanswered: int = 0
    """Samples that are left out, as no answer of theirs begins within the length."""

    def __str__(self) -> str:
        """One line for a person."""
        more = f"the model takes up to {self.length_max}"
        limit = more if self.length < self.length_max else "the most that the model takes"
        share = 100 * self.tokens_lost / self.tokens
        return (
            f"{self.source}: {self.num_cut} of {self.num_samples} samples are longer than {self.length} {self.unit} ({limit}) "
            f"and are cut: {self.tokens_lost} of {self.tokens} {self.unit} ({share:.2g} %) are not read"
            + (f"; {self.num_unanswered} lose every answer, and are left out" if self.num_unanswered else "")
        )


@dataclass(frozen=True)
class Dataset:
    """Samples as columns by input name, labels among them unless the data has none.

    ``lengths`` int64 (num_samples,) is each row's own length (1 where rows have one shape); ``digest`` is a SHA-256
    over everything; ``label_name`` is the column of the labels, empty if there is none; ``cut`` is None if all is read.
    """

    columns: Mapping[str, Column]
    lengths: Indices
    seq_len: int
    num_classes: int
    digest: str
    label_name: str = ""
    cut: Cut | None = None

    @property
    def num_cut(self) -> int:
        """Number of rows that were too long, and lost tokens."""
        return self.cut.num_cut if self.cut else 0

    @property
    def num_samples(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def mean_tokens(self) -> int:
        """Of a row, on average; 0 where rows have one shape."""
        return round(float(self.lengths.mean())) if self.lengths.max(initial=1) > 1 else 0

    @property
    def labels(self) -> Indices:
        """The class of each row, int64 (num_samples,); empty unless every row has exactly one."""
        column = self.columns.get(self.label_name)
        if isinstance(column, Dense) and column.values.ndim == 1 and column.values.dtype.kind in "iu":
            return column.values.astype(np.int64)
        return np.empty(0, np.int64)

    @property
    def has_one_label(self) -> bool:
        """Whether all rows are of one class, or have the same numbers or the same labels: there is nothing to learn."""
        column = self.columns.get(self.label_name)
        if not isinstance(column, Dense) or not len(column.values):
            return False
        is_of_row = column.values.ndim == 1 or column.values.dtype.kind == "f"
        return is_of_row and bool((column.values == column.values[:1]).all())

    def histogram(self) -> tuple[int, ...]:
        """Samples of each class, (num_classes,); empty unless every row has exactly one."""
        if not len(labels := self.labels):
            return ()
        return tuple(int(n) for n in np.bincount(labels[labels >= 0], minlength=self.num_classes))

    def rows(self, indices: Indices) -> Arrays:
        """A batch by input name; tokens are padded to the longest row, in steps of 8, at most to ``seq_len``."""
        width = self.width_of(indices)
        return {name: column.take(indices, width) for name, column in self.columns.items()}

    def width_of(self, indices: Indices) -> int:
        """Tokens of each row of a batch, padding included."""
        longest = int(self.lengths[indices].max())
        return min(-(-longest // _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE, self.seq_len)

    def num_batches(self, batch_size: int) -> int:
        """Batches in an epoch, the last and short one included."""
        if batch_size < 1:
            raise ConfigError(f"batch size must be at least 1, got {batch_size}")
        return -(-self.num_samples // batch_size)

    def num_steps(self, work: LocalWork) -> int:
        """Steps of a run over these samples."""
        if work.hides_samples:
            return num_steps(work)
        return work.steps or work.epochs * self.num_batches(work.batch_size)

    def epoch_batches(self, seed: int, epoch: int, batch_size: int) -> list[Indices]:
        """Each row once, like lengths together, batches in random order: a function of the arguments alone."""
        self.num_batches(batch_size)
        draws = Draws(seed, "batches", epoch)
        order = draws.permutation(self.num_samples)
        window = _WINDOW_BATCHES * batch_size
        parts = [self.by_length(order[start : start + window]) for start in range(0, len(order), window)]
        batches = [batch for part in parts for batch in _cut(part, batch_size)]
        return [batches[i] for i in draws.permutation(len(batches))]

    def ordered_batches(self, batch_size: int) -> list[Indices]:
        """Each row once, shortest first: for evaluation."""
        self.num_batches(batch_size)
        return _cut(self.by_length(np.arange(self.num_samples)), batch_size)

    def subset(self, indices: Indices) -> "Dataset":
        """The rows at ``indices``, in that order, as a data set of their own."""
        columns = {name: _select(column, indices) for name, column in self.columns.items()}
        lengths = self.lengths[indices]
        return make_dataset(
            columns,
            lengths,
            seq_len=self.seq_len,
            num_classes=self.num_classes,
            label_name=self.label_name,
        )

    def by_length(self, indices: Indices) -> Indices:
        """Return rows shortest first, those of one length in their order."""
        return indices[np.argsort(self.lengths[indices], kind="stable")]


def make_dataset(
    columns: Mapping[str, Column],
    lengths: Indices,
    *,
    seq_len: int,
    num_classes: int,
    label_name: str = "",
    width_max: int | None = None,
    cut: Cut | None = None,
) -> Dataset:
    """Put columns together and digest them; rows are padded to ``width_max`` at most, by default ``seq_len``."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        values = columns[name].values
        digest.update(f"{name} {values.dtype} {values.shape} {seq_len}".encode())
        digest.update(np.ascontiguousarray(values).data)
    digest.update(np.ascontiguousarray(lengths).data)
    width = seq_len if width_max is None else width_max
    return Dataset(columns, lengths, width, num_classes, digest.hexdigest(), label_name, cut)


def _cut(indices: Indices, batch_size: int) -> list[Indices]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def _select(column: Column, indices: Indices) -> Column:
    if isinstance(column, Dense):
        return Dense(column.values[indices])
    ends = np.cumsum(column.lengths)
    pieces = [column.values[ends[i] - column.lengths[i] : ends[i]] for i in indices]
    values = np.concatenate(pieces) if pieces else column.values[:0]
    return Ragged(values, column.lengths[indices], column.pad, column.dtype)
