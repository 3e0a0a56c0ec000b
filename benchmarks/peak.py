"""Peak resident memory of a training process against torch + peft's, by memory plan: MiniLM 16 x 64, BERT 8 x 128.

Every figure is the median over interleaved repeats, each a fresh process; ratios are taken pair by pair.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, medians, ratio, table
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of, model_of
from fleetune.device_runtime.tables import Table

STEPS, THREADS, REPEATS = 4, 2, 3
SIZES = Table("model", {"minilm": (16, 64), "bert": (8, 128)})
PLANS = {
    "saved": ("fp32", "full"),
    "recomputed": ("fp32", "full-recompute"),
    "recomputed, streamed": ("fp32", "full-recompute-streamed"),
    "half, int8, recomputed, streamed": ("int8", "half-recompute-streamed"),
    "the same, half the rows at a time": ("int8", "half-recompute-streamed-micro:{half}"),
}
Say = Callable[[str], None]


def measure(
    say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS, threads: int = THREADS
) -> dict[str, Any]:
    """One row per model and plan; ``only`` names models."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for name in [name for name in only if SIZES[name]] or list(SIZES):
            rows += _of(name, Path(root), say, repeats, threads)
    for line in table(rows):
        say(line)
    return {"benchmark": "peak", "threads": threads, "repeats": repeats, "rows": rows}


def _of(name: str, root: Path, say: Say, repeats: int, threads: int) -> list[dict[str, Any]]:
    batch, seq = SIZES[name]
    model = model_of(name, root)
    artifacts = {
        storage: artifact_of(name, root, base_dtype=storage, say=say) for storage in ("fp32", "int8")
    }
    size = (batch, seq, STEPS, threads)
    rounds: list[Round] = []
    for _ in range(repeats):
        found = {"torch": run_worker("torch_step", model, *size, threads=threads)}
        for who, (storage, mode) in PLANS.items():
            found[who] = run_worker(
                "device_step", artifacts[storage], *size, mode.format(half=batch // 2), threads=threads
            )
        rounds.append(found)
        say(", ".join(f"{who} {figures['peak_mb']:.0f} MB" for who, figures in found.items()))
    peaks = medians(rounds)
    return [
        {
            "case": f"{name} {batch} x {seq} {who}",
            "peak_mb": peaks[f"{who}_peak_mb"],
            "peak_over_torch": ratio(rounds, who, "torch", what="peak_mb"),
            "step_over_torch": ratio(rounds, who, "torch"),
        }
        for who in ("torch", *PLANS)
    ]
