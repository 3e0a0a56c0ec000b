"""What it costs the aggregator to hand a version to many devices over a real Mosquitto: published once, or sent to each.

Devices are real agents and links that train nothing; their updates are a few bytes, so that what is measured is the way down.
"""

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.mosquitto import mosquitto
from benchmarks.measuring.processes import FOLDER, run_worker

CASES = ("10x3", "100x0.3", "300x3")
"""Devices times MB of an adapter."""
ROUNDS, PROCESSES, REPEATS = 3, 6, 3
WAYS = {"once": True, "each": False}
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS) -> dict[str, Any]:
    """One row per case and way: medians over ``repeats``, in turns, of the means of the rounds after the first.

    Args:
        say: told each run.
        only: cases in the place of :data:`CASES`, as ``300x3``.
        repeats: how often each way is run.
    """
    rows = []
    for case in only or CASES:
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(repeats):
            for way in WAYS:
                found[way].append(run_case(case, share=WAYS[way]))
                say(f"{case}, {way}: {found[way][-1]}")
        rows += [_row(case, way, found) for way in WAYS]
    for line in table(rows):
        say(line)
    return {"benchmark": "fan-out", "repeats": repeats, "rounds": ROUNDS, "rows": rows}


def run_case(case: str, *, share: bool) -> dict[str, float]:
    """Run one job with its own server and device processes, and return what its aggregator measured."""
    count, size_mb = case.split("x")
    num_processes = min(PROCESSES, int(count))
    with (
        tempfile.TemporaryDirectory() as folder,
        mosquitto(Path(folder)) as url,
        contextlib.ExitStack() as stack,
    ):
        for number in range(num_processes):
            stack.enter_context(_devices(url, float(size_mb), range(number, int(count), num_processes)))
        return run_worker("fan_out", url, size_mb, count, ROUNDS, int(share), threads=1, limit_s=600)


def _row(case: str, way: str, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    middle = {name: statistics.median(run[name] for run in found[way]) for name in found[way][0]}
    pairs = zip(found[way], found["each"], strict=True)
    ratio = statistics.median(one["cpu_s"] / other["cpu_s"] for one, other in pairs)
    return {
        "": f"{case}, {way}",
        **{name: round(value, 3) for name, value in middle.items()},
        "cpu_ratio": round(ratio, 3),
    }


@contextlib.contextmanager
def _devices(url: str, size_mb: float, numbers: range) -> Iterator[None]:
    """A process with these devices, ended when the block is left."""
    words = [url, size_mb, numbers.start, numbers.stop, numbers.step]
    command = [sys.executable, str(FOLDER / "workers" / "fan_out_devices.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # type: ignore[union-attr]
        yield
    finally:
        process.kill()
        process.communicate()
