"""Fresh processes to measure in: each runs one file of benchmarks/workers/ and prints one JSON object on its last line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import ConfigError

FOLDER = Path(__file__).resolve().parent.parent
"""benchmarks/"""
FLOORS = ("numpy", "torch", "onnxruntime")
"""Libraries whose matrix products are timed: which is fastest depends on the machine."""


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


def _reason(done: "subprocess.CompletedProcess[str]") -> str:
    if done.returncode < 0:
        return signal.Signals(-done.returncode).name
    return (done.stderr.strip().splitlines() or ["no message"])[-1]
