"""What simulating costs: CPU milliseconds and memory of a device-round, by number of devices and of rounds, on the tiny artifact.

Each row is a fresh process that does all the work itself. Step times are given, not measured: they do not matter here.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker

CASES = ((100, 50, 100), (400, 50, 100), (1000, 50, 100), (1000, 1000, 3))
"""(devices, of them in a round, rounds)."""
Say = Callable[[str], None]


def measure(say: Say) -> dict[str, Any]:
    """One row per case: ``device_round_ms`` of CPU time, resident memory after round 1, 10, 50 and 100, and its peak."""
    rows = [run_worker("simulated_fleet", *case, threads=1) for case in CASES]
    for line in table(rows):
        say(line)
    return {"benchmark": "simulate", "rows": rows}
