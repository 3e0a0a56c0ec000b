"""A training step of MiniLM, batch 16 x 64, 2 threads: the device runtime against torch + peft and the matrix-product floor.

Every figure is the median over interleaved repeats, each repeat a fresh process; ratios are taken pair by pair.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio
from benchmarks.measuring.processes import run_floor, run_worker
from benchmarks.measuring.subjects import artifact_of, model_of

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 14, 2, 5
Say = Callable[[str], None]
SHAPE = (6, 384, 1536, 12)


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """Step time, peak memory and cold start, and their ratios."""
    with tempfile.TemporaryDirectory() as root:
        model, artifact = model_of("minilm", Path(root)), artifact_of("minilm", Path(root), say=say)
        rounds = [_round(model, artifact, say, threads) for _ in range(repeats)]
    found = medians(rounds)
    return {
        "benchmark": "step",
        "model": "all-MiniLM-L6-v2, LoRA r=8 on query and value",
        "batch": [BATCH, SEQ],
        "threads": threads,
        "repeats": repeats,
        **found,
        "step_over_torch": ratio(rounds, "device", "torch"),
        "step_over_floor": ratio(rounds, "device", "floor"),
        "half_depth_over_full": ratio(rounds, "half", "device"),
        "peak_over_torch": ratio(rounds, "device", "torch", what="peak_mb"),
        "peak_recompute_over_torch": ratio(rounds, "recompute", "torch", what="peak_mb"),
        "cold_start_over_torch": ratio(rounds, "device", "torch", what="cold_start_s"),
        "chart": chart_of(
            "who", [{"who": who, "step_ms": found[f"{who}_step_ms"]} for who in rounds[0]], "step_ms"
        ),
    }


def _round(model: Path, artifact: Path, say: Say, threads: int) -> Round:
    size = (BATCH, SEQ, STEPS)
    found = {"floor": run_floor(*SHAPE, *size, threads=threads)}
    found["torch"] = run_worker("torch_step", model, *size, threads, threads=threads)
    for name, mode in (("device", "full"), ("half", "half"), ("recompute", "recompute")):
        found[name] = run_worker("device_step", artifact, *size, threads, mode, threads=threads)
    say(", ".join(f"{who} {figures['step_ms']:.0f} ms" for who, figures in found.items()))
    return found
