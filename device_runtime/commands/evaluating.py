"""Measures a model on labelled samples by figures that people know, and writes them beside the run."""

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.arrays import Arrays, write_atomically
from fleetune.device_runtime.contracts.evaluation_file import (
    ClassFigures,
    EvaluationFile,
    OutputFigures,
    added,
)
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.run_file import EVALUATION, EVALUATION_CSV, EVALUATIONS
from fleetune.device_runtime.contracts.scores import perplexity
from fleetune.device_runtime.data.lines import as_csv
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.label_sets import LabelSets
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.metrics import ByClass, Confusion
from fleetune.device_runtime.training.regression import Regression, RegressionFigures

Counted = Confusion | LabelSets | Regression
"""What adds up answers: of one class a row, of label sets, of numbers."""
_FIGURES = ("num_samples", "loss", "accuracy", "perplexity")


def measure(
    machine: Machine,
    dataset: Dataset,
    adapter: Arrays,
    *,
    manifest: Manifest,
    data: Path | str,
    step: int | None = None,
    before_batch: Callable[[], object] = lambda: None,
) -> EvaluationFile:
    """Measure an adapter as :meth:`Machine.evaluate`, and describe what was found.

    Args:
        machine: an opened one.
        dataset: labelled samples.
        adapter: every trainable tensor by name, float32.
        manifest: of the artifact.
        data: file of the samples, for who reads.
        step: steps trained so far.
        before_batch: called before each batch; may wait.
    """
    found, counted = judge(machine, dataset, adapter, manifest=manifest, before_batch=before_batch)
    return described(found, counted, manifest, data=data, step=step)


def judge(
    machine: Machine,
    dataset: Dataset,
    adapter: Arrays,
    *,
    manifest: Manifest,
    before_batch: Callable[[], object] = lambda: None,
) -> tuple[Evaluation, Counted | None]:
    """Measure an adapter, and by class or output where the task has any; arguments as of :func:`measure`."""
    counted = counter_of(manifest)
    if counted is None:
        return machine.evaluate(dataset, adapter, before_batch=before_batch), None
    found = machine.evaluate(dataset, adapter, before_batch=before_batch, on_answers=counted.add)
    return found, counted


def counter_of(manifest: Manifest) -> Counted | None:
    """Begin to add up answers as the artifact's problem has them; None where the answers are tokens."""
    if not manifest.labels:
        return None
    if manifest.problem_type == "regression":
        return Regression(len(manifest.labels))
    return (LabelSets if manifest.problem_type else Confusion)(len(manifest.labels))


def described(
    found: Evaluation,
    counted: Counted | None,
    manifest: Manifest,
    *,
    data: Path | str,
    step: int | None = None,
    round: int | None = None,
) -> EvaluationFile:
    """Put an evaluation as its file has it; ``round`` is of the federation that asked, the rest as of :func:`measure`."""
    return EvaluationFile(
        step=step,
        round=round,
        num_samples=found.num_samples,
        loss=_finite(found.loss),
        data=str(data),
        **_figures(found, counted, manifest.labels),
    )


def _figures(found: Evaluation, counted: Counted | None, names: Sequence[str]) -> dict[str, Any]:
    """What is measured of this problem alone, by the fields of :class:`EvaluationFile`."""
    if counted is None:
        return {"accuracy": _finite(found.accuracy), "perplexity": _finite(perplexity(found.loss))}
    if isinstance(counted, Regression):
        return _of_outputs(counted.figures(), names)
    if isinstance(counted, LabelSets):
        sets = counted.metrics()
        return {
            "accuracy": None,
            "exact_match": sets.exact_match,
            "micro_f1": sets.micro_f1,
            "macro_f1": sets.macro_f1,
            "classes": _classes(sets.by_class, names),
        }
    metrics, matrix = counted.metrics(), counted.matrix
    return {
        "accuracy": _finite(found.accuracy),
        "balanced_accuracy": metrics.balanced_accuracy,
        "macro_f1": metrics.macro_f1,
        "classes": _classes(metrics.by_class, names),
        "confusion": None if matrix is None else matrix.tolist(),
    }


def _of_outputs(figures: RegressionFigures, names: Sequence[str]) -> dict[str, Any]:
    means = {name: _finite(float(getattr(figures, name).mean())) for name in ("mae", "r2", "pearson")}
    columns = [[_finite(value) for value in column.tolist()] for column in figures]
    rows = [dict(zip(figures._fields, row, strict=True)) for row in zip(*columns, strict=True)]
    outputs = [OutputFigures(name=name, **row) for name, row in zip(names, rows, strict=True)]
    return {"accuracy": None, **means, "outputs": outputs}


def write_evaluation(folder: Path, found: EvaluationFile, *, mode: int = 0o666) -> None:
    """Write ``evaluation.json``, and ``evaluation.csv``; StateError if they cannot be.

    The table has a line for each class or output, or without these one line of the figures.
    """
    with doing("made", folder):
        folder.mkdir(parents=True, exist_ok=True)
    parts: Sequence[msgspec.Struct] = found.classes or found.outputs
    table = [_FIGURES, [getattr(found, name) for name in _FIGURES]]
    if parts:
        table = [parts[0].__struct_fields__, *map(msgspec.structs.astuple, parts)]
    with doing("written", folder / EVALUATION):
        write_atomically(folder / EVALUATION, msgspec.json.encode(found) + b"\n", mode=mode)
        write_atomically(folder / EVALUATION_CSV, as_csv(table), mode=mode)


def keep_evaluation(folder: Path, found: EvaluationFile, *, mode: int = 0o666) -> None:
    """Write it, and its line of the log too; StateError if they cannot be."""
    write_evaluation(folder, found, mode=mode)
    path = folder / EVALUATIONS
    with doing("written", path):
        before = path.read_bytes() if path.exists() else b""
        write_atomically(path, added(before, found.row()), mode=mode)


def forget_evaluations(folder: Path) -> None:
    """Remove what an earlier run has left in the folder; StateError if it cannot be."""
    for name in (EVALUATION, EVALUATION_CSV, EVALUATIONS):
        with doing("removed", folder / name):
            (folder / name).unlink(missing_ok=True)


def _classes(figures: ByClass, names: Sequence[str]) -> list[ClassFigures]:
    rows = zip(*(column.tolist() for column in figures), strict=True)
    return [
        ClassFigures(name=name, **dict(zip(figures._fields, row, strict=True)))
        for name, row in zip(names, rows, strict=True)
    ]


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
