"""The figures of a run as its folder has them: of ``train``, ``aggregate``, ``demo``, ``simulate``, or an evaluating device."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.evaluation_file import EvaluationFile, read_log
from fleetune.device_runtime.contracts.run_file import (
    CHECKPOINT,
    EVALUATION,
    EVALUATIONS,
    LEDGER,
    ROUNDS,
    RUN,
    run_folder,
)
from fleetune.device_runtime.contracts.scores import ACCURACY, EXACT_MATCH, LABELS, PERPLEXITY, R2
from fleetune.device_runtime.errors import DataError, one_line
from fleetune.device_runtime.prepared import prepared

T = TypeVar("T")
Unit = Literal["step", "round"]


class Points(NamedTuple):
    """A figure at steps or rounds, which rise."""

    places: list[int]
    values: list[float]


class Matrix(NamedTuple):
    """A confusion matrix int64 (K, K), labels down and answers across, and the names of the K classes."""

    names: list[str]
    counts: Indices


class RunFigures(NamedTuple):
    """What can be drawn of a run; points may be empty."""

    folder: Path
    unit: Unit
    train_loss: Points
    """Of each step's batch, or mean of the devices' last ones."""
    loss: Points
    """On held-out samples, as the score."""
    accuracy: Points
    """Or another score: see ``score``."""
    confusion: Matrix | None
    score: str = "accuracy"
    """What the score is: of label sets the share of exact matches, of a regression R2, of a language model the perplexity."""

    @property
    def is_evaluated(self) -> bool:
        """Whether anything was measured on held-out samples."""
        return bool(self.loss.places or self.accuracy.places)


class _Round(msgspec.Struct, frozen=True):
    round: int
    loss: float | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    r2: float | None = None
    perplexity: float | None = None
    train_loss: float | None = None


class _Report(msgspec.Struct, frozen=True):
    losses: list[float] | None = None
    """Of ``train``."""
    history: list[_Round] | None = None
    """Of ``aggregate``."""
    steps: int = 0
    eval_loss: float | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    r2: float | None = None
    perplexity: float | None = None


class _Run(msgspec.Struct, frozen=True):
    report: _Report = _Report()


def read_figures(run: Path) -> RunFigures:
    """Read a run.

    Raises:
        DataError: no run there, one that has no figures yet, or a figure that cannot be; the file is named.
    """
    folder = run_folder(run)
    if (folder / ROUNDS).is_file():
        return _of_rounds(folder, _read_lines(folder / ROUNDS), folder / ROUNDS)
    report = _read(folder / RUN, _Run).report if (folder / RUN).is_file() else _Report()
    if report.history is not None:
        return _of_rounds(folder, report.history, folder / RUN)
    if report.losses is None and not (folder / EVALUATIONS).is_file():
        raise DataError(_missing(run, folder))
    return _of_steps(folder, report)


def _missing(run: Path, folder: Path) -> str:
    if any((folder / name).exists() for name in (CHECKPOINT, LEDGER)):
        return f"{run}: a run that has no figures yet ({RUN} is written at its end, or after a round)"
    if (folder / EVALUATION).exists():
        return f"{run}: figures of one evaluation, and no run; see {folder / EVALUATION}"
    return (
        f"{run}: no run here; give the --out folder of train, aggregate, demo or simulate, "
        "or the state folder of an evaluating device"
    )


def _of_steps(folder: Path, report: _Report) -> RunFigures:
    """Of ``train``, or of an evaluating device, whose places are rounds."""
    log, losses = read_log(folder), report.losses or []
    where = folder / EVALUATIONS
    unit: Unit = "round" if any(one.round is not None for one in log) else "step"
    if log:
        loss = _points(where, "loss", ((one.place, one.loss) for one in log))
        scores = {name: [(one.place, getattr(one, name)) for one in log] for name in _FIRST}
    else:
        where = folder / RUN
        loss = _points(where, "eval_loss", [(report.steps, report.eval_loss)])
        scores = {name: [(report.steps, getattr(report, name))] for name in _FIRST}
    name = _measured(scores)
    trained = _points(folder / RUN, "loss", enumerate(losses, 1))
    score = _points(where, name, scores[name])
    return RunFigures(folder, unit, trained, loss, score, _confusion(folder), LABELS[name])


def _measured(scores: Mapping[str, Sequence[tuple[int, float | None]]]) -> str:
    """The first of them that has a figure."""
    return next((n for n, found in scores.items() if any(v is not None for _, v in found)), ACCURACY)


def _of_rounds(folder: Path, rounds: list[_Round], where: Path) -> RunFigures:
    def points(name: str) -> Points:
        return _points(where, name, ((row.round, getattr(row, name)) for row in rounds))

    name = _measured({name: [(row.round, getattr(row, name)) for row in rounds] for name in _FIRST})
    loss = points("loss")
    return RunFigures(folder, "round", points("train_loss"), loss, points(name), None, LABELS[name])


def _points(where: Path, name: str, found: Iterable[tuple[int, float | None]]) -> Points:
    """Those that are there, all of them finite, a share from 0 to 1, each place after the one before."""
    pairs = [(place, value) for place, value in found if value is not None]
    for place, value in pairs:
        if not isfinite(value) or (name in _EXPECTED and not 0 <= value <= 1):
            raise DataError(f"{where}: {name} {value} at {place}; expected {_EXPECTED.get(name, _FINITE)}")
    places, values = [place for place, _ in pairs], [value for _, value in pairs]
    if any(after <= before for before, after in pairwise(places)):
        raise DataError(f"{where}: {name}: steps or rounds that go back")
    return Points(places, values)


_FINITE = "a finite number"
_EXPECTED = {"accuracy": "0 to 1", "exact_match": "0 to 1"}
_FIRST = (PERPLEXITY, EXACT_MATCH, R2, ACCURACY)
"""Figures of which a run has one; a language model has an accuracy too."""


def _confusion(folder: Path) -> Matrix | None:
    path = folder / EVALUATION
    if not path.is_file():
        return None
    found = _read(path, EvaluationFile)
    if found.confusion is None:
        return None
    names = [one.name for one in found.classes]
    shape = {len(row) for row in found.confusion}
    if shape - {len(names)} or len(found.confusion) != len(names):
        raise DataError(f"{path}: the confusion matrix is not {len(names)} x {len(names)}, as its classes")
    counts = [count for row in found.confusion for count in row]
    if min(counts, default=0) < 0 or sum(counts) >= 2**63:
        raise DataError(f"{path}: a count of the confusion matrix is below 0, or beyond 64 bits")
    return Matrix(names, np.array(found.confusion, np.int64))


def _read_lines(path: Path) -> list[_Round]:
    """Read the rounds of a simulation; a last line without its newline was being written and is left out."""
    lines = _content(path).split(b"\n")[:-1]
    return [_decoded(line, _Round, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _read(path: Path, kind: type[T]) -> T:
    return _decoded(_content(path), kind, str(path))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc


def _decoded(content: bytes, kind: type[T], where: str) -> T:
    try:
        return msgspec.json.decode(content, type=prepared(kind))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{where}: {one_line(exc)}") from exc
