"""A training step of MiniLM, batch 16 x 64, by the number of threads: time, and how much of the ideal speed-up is there."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio, table
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of

BATCH, SEQ, STEPS, REPEATS = 16, 64, 14, 3
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS) -> dict[str, Any]:
    """One row for 1, 2, 4, ... threads, up to as many as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({1 << n for n in range(cores.bit_length()) if 1 << n <= cores} | {cores})
    with tempfile.TemporaryDirectory() as root:
        artifact = artifact_of("minilm", Path(root), say=say)
        rounds = [_round(artifact, counts, say) for _ in range(repeats)]
    found = medians(rounds)
    rows = [_row(n, found[f"{n}_step_ms"], ratio(rounds, str(n), "1") or 1.0) for n in counts]
    for line in table(rows):
        say(line)
    chart = chart_of("threads", rows, "step_ms")
    return {"benchmark": "threads", "batch": [BATCH, SEQ], "repeats": repeats, "rows": rows, "chart": chart}


def _row(n: int, step_ms: float, over_one: float) -> dict[str, Any]:
    return {"threads": n, "step_ms": step_ms, "over_one": over_one, "efficiency": round(1 / n / over_one, 2)}


def _round(artifact: Path, counts: list[int], say: Say) -> Round:
    found = {
        str(n): run_worker("device_step", artifact, BATCH, SEQ, STEPS, n, "full", threads=n) for n in counts
    }
    say(", ".join(f"{n} threads {figures['step_ms']:.0f} ms" for n, figures in found.items()))
    return found
