"""DropPEFT's comparison in a small form: what each arm costs until it is as good as federated LoRA, in simulated fleets.

Cells (models on tasks) and arms are the configurations in ``benchmarks/droppeft/``. Runs are kept in the folder that
FLEETUNE_RUNS names (``droppeft-runs`` here if it names none): the same command goes on where it was stopped.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.measuring.cells import CELLS, Cell
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.toolkit.simulation.compare import compare
from fleetune.toolkit.simulation.records import SimulationReport
from fleetune.toolkit.simulation.simulate import simulate

FOLDER = Path(__file__).resolve().parent / "droppeft"
ARMS = tuple(sorted(path.stem for path in (FOLDER / "arms").glob("*.toml")))
OF = "fedlora"
"""What all others are held to."""
ROUNDS_MORE = 2
"""Every other arm has as much virtual time as federated LoRA takes, and so many times its rounds at most."""
SEEDS = 3
Say = Callable[[str], None]


def measure(
    say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0, form: str = "small"
) -> dict[str, Any]:
    """Run every arm on every cell with ``repeats`` seeds, and compare.

    Args:
        say: told of progress.
        only: names of cells and of arms; all of a kind of which none is named, ``fedlora`` anyway.
        repeats: seeds.
        threads: worker processes; 0 for one a core.
        form: ``small``, or ``full`` with what ``full.toml`` says over the cells.
    """
    cells, arms = _chosen(only)
    root = Path(os.environ.get("FLEETUNE_RUNS", "droppeft-runs")).resolve() / form
    (root / "made").mkdir(parents=True, exist_ok=True)
    found = {}
    for name in cells:
        cell = CELLS[name](root / "made")
        for seed in range(repeats):
            reference = _run(root, name, cell, OF, seed, threads=threads, form=form, say=say)
            limits = [f"until_s={reference.time_s}", f"rounds={ROUNDS_MORE * reference.rounds}"]
            for arm in arms[1:]:
                _run(root, name, cell, arm, seed, limits, threads=threads, form=form, say=say)
        runs = [root / name / arm for arm in arms]
        told = compare(runs, of=OF, charts=root / name / "charts")
        found[name] = msgspec.to_builtins(told)
        say(f"{name}: charts in {root / name / 'charts'}")
    return {"benchmark": "droppeft", "form": form, "seeds": repeats, "cells": found}


def _chosen(only: Sequence[str]) -> tuple[list[str], list[str]]:
    unknown = [name for name in only if name not in (*CELLS, *ARMS)]
    if unknown:
        raise UnknownName(f"no cell or arm {unknown[0]!r}; have: {choices((*CELLS, *ARMS))}")
    cells = [name for name in CELLS if name in only] or list(CELLS)
    arms = [name for name in ARMS if name in only and name != OF] or [name for name in ARMS if name != OF]
    return cells, [OF, *arms]


def _run(
    root: Path,
    name: str,
    cell: Cell,
    arm: str,
    seed: int,
    limits: Sequence[str] = (),
    *,
    threads: int,
    form: str,
    say: Say,
) -> SimulationReport:
    out = root / name / arm / f"seed-{seed}"
    out.mkdir(parents=True, exist_ok=True)
    config = root / name / f"{arm}.toml"
    config.write_text(_config(root, name, cell, arm, form), encoding="utf-8")
    report = simulate(config, out=out, workers=threads or None, set=[f"seed={seed}", *limits])
    took = f"{report.rounds} rounds, {report.time_s:.0f} virtual s"
    say(f"{name}, {arm}, seed {seed}: accuracy {report.accuracy:.3f} after {took}")
    return report


def _config(root: Path, name: str, cell: Cell, arm: str, form: str) -> str:
    """The cell, the arm over it, and where things are on this machine."""
    parts = [FOLDER / "cells" / f"{name}.toml", *([FOLDER / "full.toml"] if form == "full" else [])]
    included = [*parts, FOLDER / "arms" / f"{arm}.toml"]
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
