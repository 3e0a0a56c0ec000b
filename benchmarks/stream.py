"""What streaming the frozen weights costs: a BERT of 12 layers, batch 8 x 128, whose weights are more than three times the peak.

Every figure is the median over interleaved repeats, each a fresh process with a warm page cache; ratios are taken pair by
pair. ``same_bits`` says whether the trained adapter is the same to the bit as with resident weights.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio, table
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of

BATCH, SEQ, STEPS, THREADS, REPEATS = 8, 128, 6, 2, 3
MODES = (
    "full",
    "full-streamed",
    "full-recompute",
    "full-recompute-streamed",
    "full-recompute-streamed-micro:2",
    "full-recompute-streamed-micro:1",
)
TWINS = {"full-streamed": "full", "full-recompute-streamed": "full-recompute"}
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """One row per memory plan."""
    with tempfile.TemporaryDirectory() as root:
        artifact = artifact_of("bert", Path(root), say=say)
        weights_mb = (artifact / "base.safetensors").stat().st_size / 2**20
        rounds = [_round(artifact, say, threads) for _ in range(repeats)]
    found = medians(rounds)
    rows = [
        {
            "memory_plan": mode,
            "step_ms": found[f"{mode}_step_ms"],
            "over_resident": ratio(rounds, mode, "full"),
            "peak_mb": found[f"{mode}_peak_mb"],
            "weights_over_peak": round(weights_mb / found[f"{mode}_peak_mb"], 2),
            "same_bits": all(r[mode]["checksum"] == r[TWINS[mode]]["checksum"] for r in rounds)
            if mode in TWINS
            else None,
        }
        for mode in MODES
    ]
    for line in table(rows):
        say(line)
    return {
        "benchmark": "stream",
        "batch": [BATCH, SEQ],
        "threads": threads,
        "repeats": repeats,
        "weights_mb": round(weights_mb, 1),
        "rows": rows,
        "chart": chart_of("memory_plan", rows, "step_ms", "peak_mb"),
    }


def _round(artifact: Path, say: Say, threads: int) -> Round:
    found = {
        mode: run_worker("device_step", artifact, BATCH, SEQ, STEPS, threads, mode, threads=threads)
        for mode in MODES
    }
    say(", ".join(f"{mode} {figures['step_ms']:.0f} ms" for mode, figures in found.items()))
    return found
