"""A comparison: arms, each a few lines of TOML, on cells, which are models on tasks with their fleets, in simulations.

Runs are kept in the folder that FLEETUNE_RUNS names, or in one of the comparison's name here: the same command goes on where it
was stopped.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.measuring.cells import CELLS, Cell
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.toolkit.simulation.compare import compare
from fleetune.toolkit.simulation.records import SimulationReport
from fleetune.toolkit.simulation.simulate import simulate

BENCHMARKS = Path(__file__).resolve().parent.parent
SEEDS = 3
Say = Callable[[str], None]
Limits = Callable[[SimulationReport], list[str]]
"""The reference's run -> settings over those of every other arm."""


class Comparison(NamedTuple):
    """Which arms, and held to which."""

    name: str
    """Of the folder in benchmarks/ that has ``arms``, and of the runs."""
    of: str
    """The arm that all others are held to."""
    limits: Limits
    overlays: Sequence[str] = ()
    """Files of that folder between cell and arm."""

    @property
    def folder(self) -> Path:
        """Where its configurations are."""
        return BENCHMARKS / self.name

    @property
    def arms(self) -> tuple[str, ...]:
        """All names."""
        return tuple(sorted(path.stem for path in (self.folder / "arms").glob("*.toml")))

    def run(
        self,
        say: Say,
        *,
        only: Sequence[str] = (),
        repeats: int = SEEDS,
        threads: int = 0,
        form: str = "small",
    ) -> dict[str, Any]:
        """Run arms on cells with ``repeats`` seeds, and compare.

        Args:
            say: told of progress.
            only: names of cells and of arms; all of a kind of which none is named, the reference anyway.
            repeats: seeds.
            threads: worker processes; 0 for one a core.
            form: name of the folder that the runs are kept in.
        """
        cells, arms = self._chosen(only)
        root = Path(os.environ.get("FLEETUNE_RUNS", f"{self.name}-runs")).resolve() / form
        (root / "made").mkdir(parents=True, exist_ok=True)
        found = {}
        for name in cells:
            cell = CELLS[name](root / "made")
            for seed in range(repeats):
                reference = self._run(root, name, cell, self.of, seed, threads=threads, say=say)
                limits = self.limits(reference)
                for arm in arms[1:]:
                    self._run(root, name, cell, arm, seed, limits, threads=threads, say=say)
            charts = root / name / "charts"
            told = compare([root / name / arm for arm in arms], of=self.of, charts=charts)
            found[name] = msgspec.to_builtins(told)
            say(f"{name}: charts in {charts}")
        return {"benchmark": self.name, "form": form, "seeds": repeats, "cells": found}

    def _chosen(self, only: Sequence[str]) -> tuple[list[str], list[str]]:
        known = (*CELLS, *self.arms)
        if unknown := [name for name in only if name not in known]:
            raise UnknownName(f"no cell or arm {unknown[0]!r}; have: {choices(known)}")
        others = [name for name in self.arms if name != self.of]
        cells = [name for name in CELLS if name in only] or list(CELLS)
        return cells, [self.of, *([name for name in others if name in only] or others)]

    def _run(
        self,
        root: Path,
        name: str,
        cell: Cell,
        arm: str,
        seed: int,
        limits: Sequence[str] = (),
        *,
        threads: int,
        say: Say,
    ) -> SimulationReport:
        out = root / name / arm / f"seed-{seed}"
        out.mkdir(parents=True, exist_ok=True)
        config = root / name / f"{arm}.toml"
        config.write_text(self._config(root, name, cell, arm), encoding="utf-8")
        report = simulate(config, out=out, workers=threads or None, set=[f"seed={seed}", *limits])
        took = f"{report.rounds} rounds, {report.time_s:.0f} virtual s"
        say(f"{name}, {arm}, seed {seed}: accuracy {report.accuracy:.3f} after {took}")
        return report

    def _config(self, root: Path, name: str, cell: Cell, arm: str) -> str:
        """The cell, what lies over it, the arm, and where things are on this machine."""
        over = [*self.overlays, f"arms/{arm}.toml"]
        included = [BENCHMARKS / "cells" / f"{name}.toml", *(self.folder / file for file in over)]
        lines = [
            f"include = {json.dumps([str(part) for part in included])}",
            f"artifact = {_text(cell.artifact)}",
            f"timings = {_text(root / 'timings.json')}",
            f"data = {{ train = {_text(cell.train)}, test = {_text(cell.test)} }}",
        ]
        if cell.owners:
            lines.append(f"partition = {{ file = {_text(cell.owners)}, devices = 0 }}")  # one for each owner
        return "\n".join(lines) + "\n"


def _text(path: Path) -> str:
    return json.dumps(str(path))
