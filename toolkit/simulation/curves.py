"""A run as a curve: its accuracy, and what it had cost by then, at every version that was evaluated."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.run_file import ROUNDS, RUN
from fleetune.device_runtime.errors import DataError
from fleetune.toolkit.simulation.records import RoundRecord, read_lines, read_report

Doubles = NDArray[np.float64]
SUMMED = ("compute_s", "bytes_up", "bytes_down", "energy_j")
_READ = ("time_s", *SUMMED, "peak_mb", "peak_mb_mean")
MEASURES = (*_READ, "bytes")
"""What a run has cost: sums since its start, ``bytes`` of both ways, but for time (since its start, virtual) and memory
(``peak_mb``: the highest of a device so far; ``peak_mb_mean``: the mean over devices, then over the rounds so far)."""
_WINDOW = 1
"""Evaluations on either side that an accuracy is averaged with."""
_FINAL = 3
"""Evaluations at the end whose mean is the final accuracy."""


class Curve(NamedTuple):
    """One run. All arrays are of the evaluated versions, float64 (E,)."""

    name: str
    seed: int
    folder: Path
    accuracy: Doubles
    """Each the mean of its evaluation, the one before and the one after."""
    costs: dict[str, Doubles]
    """By the names in :data:`MEASURES`."""
    final: float
    """Mean of the last three evaluations, or of those there are."""
    rounds: list[RoundRecord]

    def reached(self, accuracy: float) -> int | None:
        """Place of the first evaluated version whose averaged accuracy is at least that; None if there is none."""
        found = np.flatnonzero(self.accuracy >= accuracy)
        return int(found[0]) if found.size else None


def find_runs(folder: Path) -> list[Path]:
    """Return the folders of simulations: ``folder`` itself, or those in it, however deep, in the order of their names.

    Raises:
        DataError: none is there.
    """
    found = [path.parent for path in sorted(folder.rglob(ROUNDS)) if (path.parent / RUN).is_file()]
    if not found:
        raise DataError(f"{folder}: no run of fleetune simulate here ({RUN} and {ROUNDS})")
    return found


def read_curve(folder: Path) -> Curve:
    """Read a run.

    Raises:
        DataError: no run of ``fleetune simulate``, no version evaluated, or figures that cannot be: an accuracy outside of
            0 to 1, a cost below 0 or not finite, a time that goes back.
    """
    report = read_report(folder)
    rounds = read_lines(folder / ROUNDS, RoundRecord)
    _check(folder / ROUNDS, rounds)
    places = [i for i, row in enumerate(rounds) if row.accuracy is not None]
    if not places:
        raise DataError(f"{folder}: no version was evaluated")
    measured = np.array([rounds[i].accuracy for i in places], np.float64)
    costs = {name: values[places] for name, values in _costs(rounds).items()}
    final = float(measured[-_FINAL:].mean())
    return Curve(report.name, report.seed, folder, averaged(measured), costs, final, rounds)


def averaged(values: Doubles) -> Doubles:
    """Average each value with its neighbours on either side; at an end with those there are."""
    ends = [(max(0, i - _WINDOW), i + _WINDOW + 1) for i in range(len(values))]
    return np.array([values[first:last].mean() for first, last in ends])


def _costs(rounds: Sequence[RoundRecord]) -> dict[str, Doubles]:
    def column(name: str) -> Doubles:
        return np.array([getattr(row, name) for row in rounds], np.float64)

    has_devices = column("peak_mb_mean") > 0
    worked = np.maximum(np.cumsum(has_devices), 1)
    return {
        "time_s": column("time_s"),
        **{name: np.cumsum(column(name)) for name in SUMMED},
        "bytes": np.cumsum(column("bytes_up") + column("bytes_down")),
        "peak_mb": np.maximum.accumulate(column("peak_mb")),
        "peak_mb_mean": np.cumsum(column("peak_mb_mean")) / worked,
    }


def _check(path: Path, rounds: Sequence[RoundRecord]) -> None:
    earlier = 0.0
    for line, row in enumerate(rounds, 1):
        if row.accuracy is not None and not 0 <= row.accuracy <= 1:
            raise DataError(f"{path}, line {line}: accuracy {row.accuracy}; expected 0 to 1")
        wrong = [name for name in _READ if not (isfinite(getattr(row, name)) and getattr(row, name) >= 0)]
        if wrong:
            raise DataError(
                f"{path}, line {line}: {wrong[0]} {getattr(row, wrong[0])}; expected a finite number from 0"
            )
        if row.time_s < earlier:
            raise DataError(f"{path}, line {line}: time_s {row.time_s} after {earlier}; time goes back")
        earlier = row.time_s
