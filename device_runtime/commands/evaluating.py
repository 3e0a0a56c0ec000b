"""Measures a model on labelled samples by figures that people know, and writes them beside the run."""

from collections.abc import Callable, Iterator
from math import isfinite
from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import Arrays, write_atomically
from fleetune.device_runtime.contracts.evaluation_file import ClassFigures, EvaluationFile, added
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.run_file import EVALUATION, EVALUATION_CSV, EVALUATIONS
from fleetune.device_runtime.data.lines import as_csv
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.metrics import Confusion, Metrics, perplexity

_COLUMNS = ClassFigures.__struct_fields__
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
) -> tuple[Evaluation, Confusion | None]:
    """Measure an adapter, and by class where the task has classes; arguments as of :func:`measure`."""
    counted = confusion_of(manifest)
    if counted is None:
        return machine.evaluate(dataset, adapter, before_batch=before_batch), None
    found = machine.evaluate(dataset, adapter, before_batch=before_batch, on_answers=counted.add)
    return found, counted


def confusion_of(manifest: Manifest) -> Confusion | None:
    """Begin to count answers by class; None where the answers are tokens."""
    return Confusion(len(manifest.labels)) if manifest.labels else None


def described(
    found: Evaluation,
    counted: Confusion | None,
    manifest: Manifest,
    *,
    data: Path | str,
    step: int | None = None,
    round: int | None = None,
) -> EvaluationFile:
    """Put an evaluation as its file has it; ``round`` is of the federation that asked, the rest as of :func:`measure`."""
    metrics = counted.metrics() if counted else None
    matrix = counted.matrix if counted else None
    return EvaluationFile(
        step=step,
        round=round,
        num_samples=found.num_samples,
        loss=_finite(found.loss),
        accuracy=_finite(found.accuracy),
        balanced_accuracy=metrics.balanced_accuracy if metrics else None,
        macro_f1=metrics.macro_f1 if metrics else None,
        perplexity=None if metrics else _finite(perplexity(found.loss)),
        data=str(data),
        classes=list(_classes(metrics, manifest)) if metrics else [],
        confusion=None if matrix is None else matrix.tolist(),
    )


def write_evaluation(folder: Path, found: EvaluationFile, *, mode: int = 0o666) -> None:
    """Write ``evaluation.json``, and ``evaluation.csv``; StateError if they cannot be.

    The table has a line for each class, or without classes one line of the figures.
    """
    with doing("made", folder):
        folder.mkdir(parents=True, exist_ok=True)
    table = [_COLUMNS, *([getattr(one, name) for name in _COLUMNS] for one in found.classes)]
    if not found.classes:
        table = [_FIGURES, [getattr(found, name) for name in _FIGURES]]
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


def _classes(metrics: Metrics, manifest: Manifest) -> Iterator[ClassFigures]:
    columns = (metrics.precision, metrics.recall, metrics.f1, metrics.support)
    for name, *values in zip(manifest.labels, *(column.tolist() for column in columns), strict=True):
        yield ClassFigures(name=name, **dict(zip(_COLUMNS[1:], values, strict=True)))


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
