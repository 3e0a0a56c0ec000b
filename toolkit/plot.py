"""``fleetune plot``: learning curves of runs in one picture, and the confusion matrix of each that has one."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.device_runtime.errors import ConfigError, DataError, UnknownName, choices
from fleetune.device_runtime.files import doing
from fleetune.toolkit.charts import new_figure, save
from fleetune.toolkit.run_figures import Matrix, Points, RunFigures, Unit, read_figures

log = logging.getLogger(__name__)

FORMATS = ("svg", "png")
TOGETHER = "plots"
"""Folder for pictures of several runs."""
_NAMED_MAX, _COUNTED_MAX = 60, 25
"""Of more classes a matrix has no names, or no counts: nobody could read them."""
_SMOOTHED = 50
"""A loss of single batches is averaged so that about so many points are left of a run."""
Labelled = Mapping[str, RunFigures]


def plot(
    runs: Sequence[Path | str],
    *,
    out: Path | str | None = None,
    format: str = "svg",
    on_note: Callable[[str], object] | None = None,
) -> list[Path]:
    """Draw ``curves.FORMAT`` of all runs together, and ``confusion.FORMAT`` (``confusion-NAME.FORMAT``) of each that has one.

    Args:
        runs: ``--out`` folders of ``train``, ``aggregate``, ``demo`` or ``simulate``, or state folders of evaluating devices.
        out: folder to write; None for the run's own, or for ``plots`` where there are several.
        format: ``svg`` or ``png``.
        on_note: told of runs without evaluations.

    Returns:
        The files.

    Raises:
        DataError: no run there, or figures that cannot be drawn.
        ConfigError: matplotlib is not installed, no such format, the same run twice, or a file cannot be written.
        StateError: the folder cannot be made.
    """
    if format not in FORMATS:
        raise UnknownName(f"no format {format!r}; have: {choices(FORMATS)}")
    found = _labelled([Path(run) for run in runs])
    for name, run in found.items():
        if not run.is_evaluated:
            (on_note or log.warning)(f"{name}: nothing was measured on held-out data (--eval): no score")
    folder = Path(out) if out else Path(runs[0]) if len(found) == 1 else Path(TOGETHER)
    drawable = {name: run for name, run in found.items() if run.train_loss.places or run.is_evaluated}
    if not drawable:
        raise DataError(f"{', '.join(found)}: no losses and no evaluations: nothing to draw")
    with doing("made", folder):
        folder.mkdir(parents=True, exist_ok=True)
    matrices = {name: run.confusion for name, run in found.items() if run.confusion}
    drawn = [_curves(folder / f"curves.{format}", drawable)]
    for name, matrix in matrices.items():
        suffix = "" if len(found) == 1 else f"-{name.replace(os.sep, '-')}"
        drawn.append(_confusion(folder / f"confusion{suffix}.{format}", name, matrix))
    return drawn


def _labelled(runs: list[Path]) -> dict[str, RunFigures]:
    """Runs by the name of their folder, and by so many of its parents as tell them apart."""
    if not runs:
        raise ConfigError("plot needs a run: the --out folder of train, aggregate, demo or simulate")
    folders = [run.resolve() for run in runs]
    if twice := [folder for folder, count in Counter(folders).items() if count > 1]:
        raise ConfigError(f"{twice[0]}: given twice")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return {
        os.sep.join(folder.parts[-depth:]): read_figures(run)
        for folder, run in zip(folders, runs, strict=True)
    }


def _curves(path: Path, runs: Labelled) -> Path:
    """Loss and score (accuracy, exact match, R2, perplexity) side by side; a row for runs by step, one for runs by round."""
    units = sorted({run.unit for run in runs.values()})
    figure = new_figure(11.0, 4.2 * len(units))
    for (losses, accuracies), unit in zip(
        figure.subplots(len(units), 2, squeeze=False, sharex="row"), units, strict=True
    ):
        _draw_row(losses, accuracies, {name: run for name, run in runs.items() if run.unit == unit}, unit)
    return save(figure, path)


def _draw_row(losses: Any, accuracies: Any, runs: Labelled, unit: Unit) -> None:
    for place, (name, run) in enumerate(runs.items()):
        name, color = _verbatim(name), f"C{place % 10}"
        trained = smoothed(run.train_loss) if unit == "step" else run.train_loss
        _line(losses, trained, label=f"{name}, training", color=color, alpha=0.5)
        _line(losses, run.loss, label=f"{name}, held out", color=color, marker="o")
        _line(accuracies, run.accuracy, label=name, color=color, marker="o")
    scores = ", ".join(dict.fromkeys(run.score for run in runs.values()))
    for axes, title in ((losses, "loss"), (accuracies, f"{scores} on held-out data")):
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=True, alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)


def _verbatim(name: str) -> str:
    """A name that matplotlib takes for no formula."""
    return name.replace("$", r"\$")


def _line(axes: Any, points: Points, **style: Any) -> None:
    if points.places:
        axes.plot(points.places, points.values, markersize=4, **style)


def smoothed(points: Points) -> Points:
    """Average neighbours, so that about _SMOOTHED points are left of a long run; each stands at its last step."""
    width = max(1, len(points.places) // _SMOOTHED)
    parts = [slice(start, start + width) for start in range(0, len(points.places), width)]
    means = [float(np.mean(points.values[part])) for part in parts]
    return Points([points.places[part][-1] for part in parts], means)


def _confusion(path: Path, name: str, matrix: Matrix) -> Path:
    """Shares of each label's answers as shades; names and counts where they can be read."""
    names, counts = matrix
    side = min(3.2 + 0.3 * len(names), 16.0)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = new_figure(side + 1.0, side, f"{_verbatim(name)}: {counts.trace()} of {counts.sum()} right")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="share of the label's samples", shrink=0.8)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    if len(names) <= _NAMED_MAX:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize="small", parse_math=False)
        axes.set_yticks(range(len(names)), names, fontsize="small", parse_math=False)
    if len(names) <= _COUNTED_MAX:
        _write_counts(axes, counts, shares)
    return save(figure, path)


def _write_counts(axes: Any, counts: Any, shares: Any) -> None:
    for row, column in np.argwhere(counts):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(
            column, row, str(counts[row, column]), ha="center", va="center", color=color, fontsize="small"
        )
