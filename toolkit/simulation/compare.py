"""``fleetune compare``: what each arm cost until it was as good as the reference, over seeds.

The target of a seed is a share of the final accuracy that the *reference's* run of that seed came to. An arm reaches it at its
first evaluated version whose accuracy, averaged with the evaluations before and after it, is at least that. All arms are
read alike, the reference too. An arm that does not reach it has no figure: what is said is how far it came.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from fleetune.device_runtime.errors import ConfigError, UnknownName, choices, some
from fleetune.toolkit.simulation.curves import MEASURES, Curve, find_runs, read_curve

Runs = dict[str, dict[int, Curve]]
"""By arm, then by seed."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over seeds."""

    mean: float
    std: float
    """Sample standard deviation; 0 of one seed."""
    seeds: int


class Reached(msgspec.Struct, frozen=True, kw_only=True):
    """What an arm had cost when it reached a target."""

    share: float
    """Of the reference's final accuracy."""
    accuracy: float
    """That is, mean over seeds."""
    reached: int
    """Seeds that did."""
    seeds: int
    best: float
    """Best averaged accuracy, mean over seeds: how far it came."""
    costs: dict[str, Spread | None]
    """By measure (:data:`MEASURES`); null unless every seed reached it."""
    ratios: dict[str, float | None]
    """Median over seeds of its cost by the reference's of the same seed; a seed that did not reach it counts as infinite, and a
    median that is infinite, or of a reference that costs nothing, is null."""


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """An arm: all runs of one name."""

    name: str
    seeds: list[int]
    final: Spread
    """Accuracy at the end, as the reference's is counted."""
    targets: list[Reached]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All arms against one of them."""

    of: str
    """The reference."""
    arms: list[Arm]
    """The reference first, the others by name."""
    notes: list[str]
    """Runs that had no counterpart and were left out."""
    charts: list[str]
    """Files drawn."""


def compare(
    dirs: Sequence[Path | str] | Path | str,
    *,
    to: Sequence[float] = (0.95, 0.99),
    of: str | None = None,
    charts: Path | None = None,
) -> Comparison:
    """Compare runs of ``fleetune simulate``.

    Args:
        dirs: folders of runs, or folders that have such in them.
        to: shares of the reference's final accuracy.
        of: name of the reference; the arm of the first run without it.
        charts: folder to draw charts into.

    Raises:
        ConfigError: a share that is not above 0 and at most 1, no such arm, or one arm and seed twice.
        DataError: a folder without a run, or with figures that cannot be.
    """
    folders = [dirs] if isinstance(dirs, (str, Path)) else dirs
    curves = [read_curve(run) for folder in folders for run in find_runs(Path(folder))]
    runs = _by_arm(curves)
    reference = _reference(runs, of or curves[0].name)
    if not to or not all(0 < share <= 1 for share in to):
        raise ConfigError(f"to {', '.join(map(str, to))}: expected shares above 0, at most 1")
    names = [reference, *sorted(runs.keys() - {reference})]
    paired = {name: _paired(runs[name], runs[reference]) for name in names}
    arms = [_arm(name, paired[name], runs[reference], to) for name in names if paired[name]]
    return Comparison(
        of=reference,
        arms=arms,
        notes=[*_left_out(runs, paired, reference)],
        charts=_drawn(charts, {arm.name: paired[arm.name] for arm in arms}, arms),
    )


def to_target(curve: Curve, accuracy: float) -> dict[str, float] | None:
    """Return what a run had cost, by measure, when it reached an accuracy; None if it never did."""
    place = curve.reached(accuracy)
    return None if place is None else {name: float(curve.costs[name][place]) for name in MEASURES}


def _by_arm(curves: Sequence[Curve]) -> Runs:
    runs: Runs = {}
    for curve in curves:
        seeds = runs.setdefault(curve.name, {})
        if curve.seed in seeds:
            where = f"{seeds[curve.seed].folder} and {curve.folder}"
            raise ConfigError(f"{where}: both are arm {curve.name!r} with seed {curve.seed}")
        seeds[curve.seed] = curve
    return runs


def _reference(runs: Runs, name: str) -> str:
    if name not in runs:
        raise UnknownName(f"no arm {name!r}; have: {choices(runs)}")
    if flat := [curve.folder for curve in runs[name].values() if not curve.final > 0]:
        raise ConfigError(f"{flat[0]}: the reference ends at an accuracy of 0, of which there is no share")
    return name


def _paired(arm: Mapping[int, Curve], reference: Mapping[int, Curve]) -> dict[int, Curve]:
    return {seed: arm[seed] for seed in sorted(arm.keys() & reference.keys())}


def _left_out(runs: Runs, paired: Runs, reference: str) -> list[str]:
    missing = {name: sorted(runs[name].keys() - paired[name].keys()) for name in paired}
    return [
        f"{name}: seeds {some(list(map(str, seeds)))} are left out, {reference} has no run of them"
        for name, seeds in missing.items()
        if seeds
    ]


def _arm(name: str, curves: Mapping[int, Curve], reference: Mapping[int, Curve], to: Sequence[float]) -> Arm:
    return Arm(
        name=name,
        seeds=[*curves],
        final=_spread([curve.final for curve in curves.values()]),
        targets=[_reached(curves, reference, share) for share in to],
    )


def _reached(curves: Mapping[int, Curve], reference: Mapping[int, Curve], share: float) -> Reached:
    wanted = {seed: share * reference[seed].final for seed in curves}
    mine = {seed: to_target(curve, wanted[seed]) for seed, curve in curves.items()}
    theirs = {seed: to_target(reference[seed], wanted[seed]) for seed in curves}
    found = [costs for costs in mine.values() if costs is not None]
    whole = len(found) == len(curves)
    return Reached(
        share=share,
        accuracy=float(np.mean([*wanted.values()])),
        reached=len(found),
        seeds=len(curves),
        best=float(np.mean([curve.accuracy.max() for curve in curves.values()])),
        costs={name: _spread([costs[name] for costs in found]) if whole else None for name in MEASURES},
        ratios={name: _ratio([(mine[seed], theirs[seed]) for seed in curves], name) for name in MEASURES},
    )


def _ratio(
    pairs: Sequence[tuple[Mapping[str, float] | None, Mapping[str, float] | None]], name: str
) -> float | None:
    if any(theirs is None or not theirs[name] for _, theirs in pairs):
        return None
    ratios = [mine[name] / theirs[name] if mine else np.inf for mine, theirs in pairs if theirs]
    found = median(ratios)
    return found if np.isfinite(found) else None


def _spread(values: Sequence[float]) -> Spread:
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(mean=float(np.mean(values)), std=std, seeds=len(values))


def _drawn(folder: Path | None, runs: Runs, arms: Sequence[Arm]) -> list[str]:
    if folder is None:
        return []
    from fleetune.toolkit.simulation.charts import draw_comparison

    drawn = draw_comparison(folder, runs, {arm.name: arm.targets for arm in arms})
    return [str(path) for path in drawn]
