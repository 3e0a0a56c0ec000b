"""``fleetune bench NAME``: run one file of benchmarks/, which lies beside the packages in a checkout."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_runtime.errors import ConfigError, UnknownName, choices

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def bench(name: str, *, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run ``benchmarks/NAME.py`` and return its figures.

    Each such file has one function ``measure(say)``: it tells ``say`` its progress and returns figures.

    Raises:
        UnknownName: there is no such figure.
        ConfigError: fleetune is not installed from a source checkout.
    """
    figures = {path.stem: path for path in FOLDER.glob("[a-z]*.py")}
    if not figures:
        raise ConfigError(
            f"benchmarks are run from a source checkout; there is no {FOLDER.name}/ beside this installation"
        )
    if name not in figures:
        raise UnknownName(f"no benchmark {name!r}; have: {choices(figures)}")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", figures[name])
    if spec is None or spec.loader is None:
        raise ConfigError(f"{figures[name]} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.measure(on_progress or (lambda line: None))
    return result


def run_worker(name: str, *arguments: object, threads: int) -> dict[str, Any]:
    """Run ``benchmarks/workers/NAME.py`` in a fresh process and return the object that it prints last.

    A ``first_done`` (wall-clock time of the first finished step) becomes ``cold_start_s``, counted from the process's start.

    Raises:
        ConfigError: the worker failed; says with what.
    """
    limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    command = [sys.executable, str(FOLDER / "workers" / f"{name}.py"), *map(str, arguments)]
    started = time.time()
    done = subprocess.run(command, env={**os.environ, **limits}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(
            f"benchmark worker {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
        )
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    if "first_done" in figures:
        figures["cold_start_s"] = figures.pop("first_done") - started
    return figures
