"""A round of 1 to 300 devices over a real Mosquitto beside Flower's simulation, on the same adapter and in turns.

Flower and Ray stand in an environment of their own (``python -m venv F; F/bin/pip install 'flwr[simulation]'``, which brings the
Ray that Flower asks for; others are quicker or slower): FLEETUNE_FLOWER names its python. Both sides train nothing; the
simulation has neither a wire nor a disk, ours has both. CPU seconds are those of the process that hands out and merges: our
aggregator, and Flower's server with its backend, all threads of each, without Mosquitto and without Ray's own processes.
``servers_cpu_s`` has these besides, means of the same rounds: aggregator and Mosquitto; server, gcs, raylet (which is the store)
and agents. Devices, of ours and in Ray's workers, are in neither.
"""

import os
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.crowd import run_case
from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker
from fleetune.device_runtime.errors import ConfigError

SIZE_MB, ROUNDS, REPEATS = 0.3, 4, 3
COUNTS = ("1", "10", "100", "300")
PYTHON = "FLEETUNE_FLOWER"
LIMIT_S = 300
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS) -> dict[str, Any]:
    """One row per number of devices: medians over ``repeats``, and of the ratios within each.

    Args:
        say: told each run.
        only: numbers of devices in the place of :data:`COUNTS`.
        repeats: how often each pair is run.

    Raises:
        ConfigError: FLEETUNE_FLOWER names no python that can import flwr and ray.
    """
    python = _python()
    rows = []
    for count in only or COUNTS:
        pairs = []
        for _ in range(repeats):
            ours = run_case(f"{count}x{SIZE_MB:g}", rounds=ROUNDS)
            theirs = run_worker(
                "flower_rounds", SIZE_MB, count, ROUNDS, threads=1, python=python, limit_s=LIMIT_S
            )
            pairs.append((ours, theirs))
            say(f"{count} devices: fleetune {_shown(ours)}; Flower {theirs['version']} {_shown(theirs)}")
        rows.append(_row(count, pairs))
    for line in table(rows):
        say(line)
    return {"benchmark": "flower", "repeats": repeats, "rounds": ROUNDS, "rows": rows}


def _python() -> str:
    python = os.environ.get(PYTHON, "")
    if not python:
        raise ConfigError(
            f"{PYTHON} is not set: it names the python of an environment that has flwr and ray (pip install 'flwr[simulation]')"
        )
    try:
        done = subprocess.run([python, "-c", "import flwr, ray"], capture_output=True, text=True, check=False)
    except OSError as exc:
        raise ConfigError(f"{PYTHON}={python}: cannot be run: {exc.strerror}") from exc
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise ConfigError(
            f"{PYTHON}={python}: it cannot import flwr and ray: {reason}; pip install 'flwr[simulation]'"
        )
    return python


def _shown(figures: dict[str, Any]) -> str:
    return f"{figures['wall_s']:.3f} s, server CPU {figures['cpu_s']:.3f} s"


def _row(count: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"": f"{count} devices"}
    for name in ("wall_s", "cpu_s", "servers_cpu_s", "peak_mb"):
        row[name] = round(statistics.median(ours[name] for ours, _ in pairs), 3)
        row[f"flower_{name}"] = round(statistics.median(theirs[name] for _, theirs in pairs), 3)
        row[f"{name.rpartition('_')[0]}_ratio"] = round(
            statistics.median(ours[name] / theirs[name] for ours, theirs in pairs), 3
        )
    return row
