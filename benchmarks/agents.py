"""Overhead of one round against the number of agents in one process: real agents and aggregator, work that costs nothing."""

import statistics
from collections.abc import Callable, Sequence
from math import log
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker

COUNTS = (10, 100, 1000)
REPEATS = 3
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS) -> dict[str, Any]:
    """One row per number of agents, each in fresh processes; ``only`` gives other numbers.

    ``growth`` is the exponent from the row before to this one: log of the ratio of CPU seconds over log of that of
    agents. n log n from 100 to 1000 is 1.18.
    """
    rows = [_of(int(count), repeats, say) for count in only or COUNTS]
    for row, before in zip(rows, (None, *rows), strict=False):
        row["growth"] = _exponent(before, row) if before else None
    for line in table(rows):
        say(line)
    return {"benchmark": "agents", "repeats": repeats, "rows": rows}


def _of(count: int, repeats: int, say: Say) -> dict[str, Any]:
    found = []
    for _ in range(repeats):
        found.append(run_worker("many_agents", count, threads=1))
        say(f"{count} agents: {found[-1]['round_cpu_s']:.3f} CPU seconds a round")
    middle = {name: statistics.median(figures[name] for figures in found) for name in found[0]}
    return {"agents": count, **{name: round(value, 3) for name, value in middle.items()}}


def _exponent(before: dict[str, Any], after: dict[str, Any]) -> float:
    ratio = after["round_cpu_s"] / before["round_cpu_s"]
    return round(log(ratio) / log(after["agents"] / before["agents"]), 2)
