"""``evaluation.json`` and the log of evaluations: how good a model was on labelled samples, as a run's folder keeps it."""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.run_file import EVALUATIONS
from fleetune.device_runtime.errors import DataError
from fleetune.device_runtime.prepared import prepared

LOG_BYTES_MAX = 256 * 1024
"""Of a longer log the older half goes: about 1,500 evaluations stay."""


FIGURES = (
    *("loss", "accuracy", "balanced_accuracy", "macro_f1", "perplexity"),
    *("micro_f1", "exact_match", "mae", "r2", "pearson"),
)
"""Fields of :class:`Evaluated` that are figures."""


class Evaluated(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one evaluation at full depth; None where one is not finite, or the task has none such."""

    step: int | None = None
    """Steps that were trained before it; None outside of ``train``."""
    round: int | None = None
    """Of the federation in which it was asked for; None outside of one."""
    num_samples: int
    loss: float | None
    accuracy: float | None
    balanced_accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: float | None = None
    """Of a language model: e to the loss."""
    micro_f1: float | None = None
    """Of label sets, as ``exact_match``; their ``macro_f1`` is over all labels."""
    exact_match: float | None = None
    mae: float | None = None
    """Of a regression, as ``r2`` and ``pearson``: the mean over its outputs; the loss is the mean squared error."""
    r2: float | None = None
    pearson: float | None = None

    @property
    def place(self) -> int:
        """Its step, or its round; 0 of neither."""
        return (self.step if self.round is None else self.round) or 0

    def figures(self) -> dict[str, float]:
        """Those there are, by name."""
        found = {name: getattr(self, name) for name in FIGURES}
        return {name: value for name, value in found.items() if value is not None}

    def __str__(self) -> str:
        """One line for a person."""
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.figures().items())
        return f"{shown or 'no figure is finite'} on {self.num_samples} samples"


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One class; see :class:`fleetune.device_runtime.training.metrics.Metrics`."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


class OutputFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a regression; None where labels, or answers, do not differ."""

    name: str
    mse: float | None
    mae: float | None
    r2: float | None
    pearson: float | None


class EvaluationFile(Evaluated, frozen=True, kw_only=True):
    """Content of ``evaluation.json``."""

    data: str
    """File of the samples."""
    classes: list[ClassFigures] = []
    """None of a language model, or a regression."""
    outputs: list[OutputFigures] = []
    """Of a regression."""
    confusion: list[list[int]] | None = None
    """Samples (or words) by label, then by answer; None of a language model, of too many classes, and where a
    row's label is not one class."""

    def row(self) -> Evaluated:
        """Without what is of single classes."""
        return Evaluated(**{name: getattr(self, name) for name in Evaluated.__struct_fields__})


def added(content: bytes, row: Evaluated) -> bytes:
    """Return a log with one more line; it takes the place of what is of the same step or round, or a later one.

    A line that cannot be read is left out, and the older half where the log is longer than LOG_BYTES_MAX.
    """
    kept = [line for line in _readable(content) if line.place < row.place]
    if len(content) > LOG_BYTES_MAX:
        kept = kept[len(kept) // 2 :]
    return msgspec.json.Encoder().encode_lines([*kept, row])


def read_log(folder: Path) -> list[Evaluated]:
    """Read the log of a folder, oldest first; empty if there is none.

    Raises:
        DataError: it cannot be read; the line is named.
    """
    path = folder / EVALUATIONS
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc
    return [_read(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _read(line: bytes, where: str) -> Evaluated:
    try:
        return msgspec.json.decode(line, type=prepared(Evaluated))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{where}: {exc}") from exc


def _readable(content: bytes) -> Iterator[Evaluated]:
    for line in content.splitlines():
        try:
            yield _read(line, "")
        except DataError:
            continue
