"""Charts of simulations: accuracy against virtual time, bytes and energy, arms over time, memory; SVG files in a folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fleetune.broker.store.store import ByKind
from fleetune.device_runtime.files import doing
from fleetune.toolkit.charts import new_figure, save
from fleetune.toolkit.simulation.curves import Curve, Doubles, read_curve
from fleetune.toolkit.simulation.records import DEVICES, Choice, DeviceRecord, RoundRecord, read_lines

if TYPE_CHECKING:
    from fleetune.toolkit.simulation.compare import Reached

_GRID = 100
"""Times at which runs of several seeds are averaged, for the eye alone."""
_DEVICES_SHOWN = 40
_HOUR = 3600.0
_AGAINST = {
    "time_s": (_HOUR, "virtual hours"),
    "bytes": (1e6, "MB, both ways"),
    "energy_j": (3600.0, "Wh, by profiles' watts"),
}
"""What accuracy is drawn against: unit and label."""


def draw_run(folder: Path, out: Path | None = None) -> list[Path]:
    """Draw one run into ``out``, or into its own folder: ``accuracy.svg``, ``arms.svg``, ``bytes.svg`` and ``memory.svg``.

    Raises:
        DataError: no run there, or figures that cannot be.
        ConfigError: matplotlib is not installed, or a file cannot be written.
    """
    curve, out = read_curve(folder), out or folder
    devices = read_lines(folder / DEVICES, DeviceRecord)
    return [
        _accuracy(out / "accuracy.svg", {curve.name: {curve.seed: curve}}),
        _arms(out / "arms.svg", curve.rounds),
        _bytes(out / "bytes.svg", curve.rounds),
        _memory(out / "memory.svg", devices),
    ]


def draw_comparison(
    folder: Path, runs: Mapping[str, Mapping[int, Curve]], targets: Mapping[str, Sequence["Reached"]]
) -> list[Path]:
    """Draw arms side by side into ``folder``, which is made: ``accuracy.svg``, and the costs of each target.

    Args:
        folder: to write to.
        runs: by arm, then by seed.
        targets: what each arm had cost; an arm that did not reach a target has no bar.

    Raises:
        ConfigError: matplotlib is not installed, or a file cannot be written.
        StateError: the folder cannot be made.
    """
    with doing("made", folder):
        folder.mkdir(parents=True, exist_ok=True)
    drawn = [_accuracy(folder / "accuracy.svg", runs)]
    for place, target in enumerate(next(iter(targets.values()), ())):
        at = {name: found[place] for name, found in targets.items()}
        drawn.append(_costs(folder / f"cost-{100 * target.share:g}.svg", at, target.share))
    return drawn


def band(curves: Sequence[Curve], measure: str) -> tuple[Doubles, Doubles, Doubles]:
    """Return places of a measure that all runs came by, and mean and standard deviation of their accuracy there.

    Between evaluations a line is taken; for charts alone.
    """
    start = max(curve.costs[measure][0] for curve in curves)
    end = min(curve.costs[measure][-1] for curve in curves)
    places = np.linspace(start, max(start, end), _GRID)
    found = np.stack([np.interp(places, curve.costs[measure], curve.accuracy) for curve in curves])
    return places, found.mean(axis=0), found.std(axis=0, ddof=1) if len(curves) > 1 else 0 * places


def _accuracy(path: Path, runs: Mapping[str, Mapping[int, Curve]]) -> Path:
    figure = new_figure(
        5.0 * len(_AGAINST), 4.2, "accuracy of the newest version; mean and spread over seeds"
    )
    panels = figure.subplots(1, len(_AGAINST), sharey=True)
    for axes, (measure, (unit, label)) in zip(panels, _AGAINST.items(), strict=True):
        for name, seeds in runs.items():
            places, mean, std = band([*seeds.values()], measure)
            (line,) = axes.plot(places / unit, mean, label=name)
            axes.fill_between(places / unit, mean - std, mean + std, color=line.get_color(), alpha=0.2)
        axes.set_xlabel(label)
        axes.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("accuracy")
    panels[0].legend(fontsize="small")
    return save(figure, path)


def _costs(path: Path, arms: Mapping[str, "Reached"], share: float) -> Path:
    figure = new_figure(14.0, 0.45 * len(arms) + 1.6, f"to {share:.0%} of the reference's final accuracy")
    for axes, (measure, (unit, label)) in zip(
        figure.subplots(1, len(_SHOWN), sharey=True), _SHOWN.items(), strict=True
    ):
        found = [arm.costs[measure] for arm in arms.values()]
        means = [one.mean / unit if one else 0.0 for one in found]
        errors = [one.std / unit if one else 0.0 for one in found]
        bars = axes.barh([*arms], means, xerr=errors, color="#3b6ea5")
        axes.bar_label(bars, ["" if one else "not reached" for one in found], padding=3, fontsize="small")
        axes.set_xlabel(label)
    axes.invert_yaxis()
    return save(figure, path)


def _arms(path: Path, rounds: Sequence[RoundRecord]) -> Path:
    """A point for each device and round: what it was asked to train by; of a large fleet the first devices."""
    names = sorted({choice.device for row in rounds for choice in row.choices})
    rows = {name: place for place, name in enumerate(names[:_DEVICES_SHOWN])}
    made: dict[str, list[tuple[float, int]]] = {}
    for row in rounds:
        for choice in _shown_choices(row, rows):
            made.setdefault(choice.policy, []).append((row.time_s / _HOUR, rows[choice.device]))
    figure = new_figure(8.0, 1.6 + 0.18 * max(len(rows), 4), "what each device trained by")
    axes = figure.subplots()
    for policy, points in sorted(made.items()):
        axes.scatter(*zip(*points, strict=True), s=14, label=policy)
    axes.set_yticks([*rows.values()], [*rows], fontsize="x-small")
    more = f"; {len(names) - len(rows)} more devices are not shown" if len(names) > len(rows) else ""
    axes.set_xlabel(f"virtual hours{more}")
    if made:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(figure, path)


def _bytes(path: Path, rounds: Sequence[RoundRecord]) -> Path:
    """Bytes of each round by kind, one on the other; down and up side by side."""
    figure = new_figure(10.0, 4.2, "bytes of each round, by kind")
    numbers, kinds = [row.round for row in rounds], ByKind.__struct_fields__
    for axes, way in zip(figure.subplots(1, 2, sharey=True), ("down", "up"), strict=True):
        sizes = [[getattr(getattr(row, way), kind) / 1e6 for row in rounds] for kind in kinds]
        axes.stackplot(numbers, sizes, labels=kinds, step="mid")
        axes.set_xlabel(f"round; {way}")
    axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("MB")
    return save(figure, path)


def _shown_choices(row: RoundRecord, rows: Mapping[str, int]) -> list[Choice]:
    return [choice for choice in row.choices if choice.device in rows]


def _memory(path: Path, devices: Sequence[DeviceRecord]) -> Path:
    """Peak of each device, in the order of their peaks, by profile."""
    figure = new_figure(8.0, 4.2, "expected peak of training, by device")
    axes = figure.subplots()
    ordered = sorted(devices, key=lambda device: (device.peak_mb, device.device))
    for profile in sorted({device.profile for device in devices}):
        points = [(i, one.peak_mb) for i, one in enumerate(ordered) if one.profile == profile]
        axes.scatter(*zip(*points, strict=True), s=14, label=profile)
    axes.set_xlabel("devices, by peak")
    axes.set_ylabel("MB")
    axes.set_ylim(bottom=0)
    if devices:
        axes.legend(fontsize="small")
    return save(figure, path)


_SHOWN = {
    "time_s": (_HOUR, "virtual hours"),
    "bytes_up": (1e6, "MB up"),
    "bytes_down": (1e6, "MB down"),
    "energy_j": (3600.0, "Wh, by profiles' watts"),
    "peak_mb": (1.0, "peak MB"),
}
"""What a target's bars show: unit and label."""
