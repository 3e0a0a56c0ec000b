"""``fleetune bench NAME``: run one file of benchmarks/, which lies beside the packages in a checkout."""

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import ConfigError, UnknownName, choices
from fleetune.toolkit.charts import draw

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
FLOORS = ("numpy", "torch", "onnxruntime")
"""Libraries whose matrix products are timed: which is fastest depends on the machine."""


def bench(
    name: str,
    *,
    only: Sequence[str] | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    chart: Path | str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run ``benchmarks/NAME.py`` and return its figures.

    Each such file has one function ``measure(say)``: it tells ``say`` its progress and returns figures.

    Args:
        name: which file.
        only: what of it to measure; None for everything.
        repeats: interleaved repeats; None for as many as the file says.
        threads: of each process measured; None for as many as the file says.
        chart: SVG file to draw the figures into.
        on_progress: called with lines.

    Raises:
        UnknownName: there is no such figure.
        ConfigError: fleetune is not installed from a source checkout, or this figure cannot be asked for that way.
    """
    figures = {path.stem.replace("_", "-"): path for path in FOLDER.glob("[a-z]*.py")}
    if not figures:
        raise ConfigError(
            f"benchmarks are run from a source checkout; there is no {FOLDER.name}/ beside this installation"
        )
    name = name.replace("_", "-")
    if name not in figures:
        raise UnknownName(f"no benchmark {name!r}; have: {choices(figures)}")
    spec = importlib.util.spec_from_file_location(f"benchmark_{figures[name].stem}", figures[name])
    if spec is None or spec.loader is None:
        raise ConfigError(f"{figures[name]} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    asked = {"only": only, "repeats": repeats, "threads": threads}
    found = _measured(name, module.measure, on_progress, {n: v for n, v in asked.items() if v is not None})
    drawn = found.pop("chart", None)
    if chart:
        if drawn is None:
            raise ConfigError(f"benchmark {name} has no chart")
        draw(Path(chart), (module.__doc__ or name).partition("\n")[0], drawn)
    return found


def run_worker(
    name: str,
    *arguments: object,
    threads: int,
    python: str | Path = sys.executable,
    limit_s: float | None = None,
) -> dict[str, Any]:
    """Run ``benchmarks/workers/NAME.py`` in a fresh process and return the object that it prints last.

    A ``first_done`` (wall-clock time of the first finished step) becomes ``cold_start_s``, counted from the process's start.

    Args:
        name: the file.
        arguments: its words.
        threads: limit of the libraries that read it from the environment.
        python: whose environment it runs in; this one's by default.
        limit_s: seconds after which it is ended.

    Raises:
        ConfigError: the worker failed; says with what.
    """
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment = {**os.environ, **limits, "PYTHONPATH": str(FOLDER.parent)}
    command = [str(python), str(FOLDER / "workers" / f"{name}.py"), *map(str, arguments)]
    started = time.time()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise ConfigError(f"benchmark worker {name} failed: {exc}") from exc
    if done.returncode:
        raise ConfigError(f"benchmark worker {name} failed: {_reason(done)}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "first_done" in figures:
        figures["cold_start_s"] = figures.pop("first_done") - started
    return figures


def run_floor(*arguments: object, threads: int) -> dict[str, float]:
    """The matrix products of a step (``benchmarks/workers/floor.py``) by each library; ``step_ms`` is the fastest's."""
    found = {
        f"{library}_ms": run_worker("floor", library, *arguments, threads, threads=threads)["step_ms"]
        for library in FLOORS
    }
    return {"step_ms": min(found.values()), **found}


def _measured(
    name: str,
    measure: Callable[..., dict[str, Any]],
    on_progress: Callable[[str], None] | None,
    asked: dict[str, Any],
) -> dict[str, Any]:
    if strange := sorted(asked.keys() - inspect.signature(measure).parameters):
        raise ConfigError(f"benchmark {name} takes no {' and no '.join(f'--{n}' for n in strange)}")
    if low := sorted(n for n in asked.keys() & {"repeats", "threads"} if asked[n] < 1):
        raise ConfigError(f"--{low[0]} {asked[low[0]]}: expected 1 or more")
    return measure(on_progress or (lambda line: None), **asked)


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    return (done.stderr.strip().splitlines() or ["no message"])[-1]
