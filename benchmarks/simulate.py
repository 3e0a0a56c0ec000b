"""What simulating costs: CPU milliseconds and memory of a device-round, by number of devices and of rounds, on the tiny artifact.

Each row is a fresh process that does all the work itself. Step times are given, not measured: they do not matter here.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker

CASES = ((10, 10, 4), (100, 100, 4), (1000, 1000, 2), (100, 20, 10), (100, 20, 50))
"""(devices, of them in a round, rounds)."""
Say = Callable[[str], None]


def measure(say: Say) -> dict[str, Any]:
    """One row per case: ``device_round_ms`` of CPU time, and resident memory when half of the rounds are done and at the end."""
    rows = [run_worker("simulated_fleet", *case, threads=1) for case in CASES]
    for line in table(rows):
        say(line)
    return {"benchmark": "simulate", "rows": rows}
