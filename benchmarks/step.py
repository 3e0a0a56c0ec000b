"""A training step of MiniLM, batch 16 x 64, 2 threads: the device runtime against torch + peft and the matrix-product floor.

Every figure is the median over interleaved repeats, each repeat a fresh process; ratios are taken pair by pair.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.benchmark import run_worker
from toolkit.export import export
from toolkit.models import packaged_model

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 14, 2, 5
SHAPE = (6, 384, 1536, 12)


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Step time, peak memory and cold start, and their ratios."""
    model = packaged_model()
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        export(model, task="sequence-classification", num_labels=77, out=artifact, on_progress=say)
        rounds = [_round(model, artifact, say, i) for i in range(REPEATS)]
    return {
        "benchmark": "step",
        "model": "all-MiniLM-L6-v2, LoRA r=8 on query and value",
        "batch": [BATCH, SEQ],
        "threads": THREADS,
        "repeats": REPEATS,
        **{f"{who}_{what}": _median(rounds, who, what) for who in rounds[0] for what in rounds[0][who]},
        "step_over_torch": _ratio(rounds, ("device", "step_ms"), ("torch", "step_ms")),
        "step_over_floor": _ratio(rounds, ("device", "step_ms"), ("floor", "step_ms")),
        "half_depth_over_full": _ratio(rounds, ("half", "step_ms"), ("device", "step_ms")),
        "peak_over_torch": _ratio(rounds, ("device", "peak_mb"), ("torch", "peak_mb")),
        "peak_recompute_over_torch": _ratio(rounds, ("recompute", "peak_mb"), ("torch", "peak_mb")),
        "cold_start_over_torch": _ratio(rounds, ("device", "cold_start_s"), ("torch", "cold_start_s")),
    }


def _round(
    model: Path, artifact: Path, say: Callable[[str], None], number: int
) -> dict[str, dict[str, float]]:
    size = (BATCH, SEQ, STEPS)
    found = {"floor": run_worker("floor", *SHAPE, *size, threads=THREADS)}
    found["torch"] = run_worker("torch_step", model, *size, THREADS, threads=THREADS)
    for name, mode in (("device", "full"), ("half", "half"), ("recompute", "recompute")):
        found[name] = run_worker("device_step", artifact, *size, THREADS, mode, threads=THREADS)
    shown = ", ".join(f"{who} {figures['step_ms']:.0f} ms" for who, figures in found.items())
    say(f"repeat {number + 1} of {REPEATS}: {shown}")
    return found


def _median(rounds: list[dict[str, dict[str, float]]], who: str, what: str) -> float:
    return round(statistics.median(r[who][what] for r in rounds), 3)


def _ratio(rounds: list[dict[str, dict[str, float]]], over: tuple[str, str], under: tuple[str, str]) -> float:
    return round(statistics.median(r[over[0]][over[1]] / r[under[0]][under[1]] for r in rounds), 3)
