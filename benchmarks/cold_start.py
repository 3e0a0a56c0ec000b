"""From the start of a process to its first finished step: the device runtime against torch + peft, MiniLM, batch 16 x 64."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of, model_of

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 3, 2, 5
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """Seconds, and their ratios to torch's."""
    with tempfile.TemporaryDirectory() as root:
        model = model_of("minilm", Path(root))
        artifacts = {
            storage: artifact_of("minilm", Path(root), base_dtype=storage, say=say)
            for storage in ("fp32", "int8")
        }
        rounds = [_round(model, artifacts, say, threads) for _ in range(repeats)]
    found = {name: value for name, value in medians(rounds).items() if name.endswith("cold_start_s")}
    return {
        "benchmark": "cold-start",
        "batch": [BATCH, SEQ],
        "threads": threads,
        "repeats": repeats,
        **found,
        **{
            f"{who}_over_torch": ratio(rounds, who, "torch", what="cold_start_s")
            for who in rounds[0]
            if who != "torch"
        },
        "chart": chart_of("who", [{"who": who, "s": found[f"{who}_cold_start_s"]} for who in rounds[0]], "s"),
    }


def _round(model: Path, artifacts: dict[str, Path], say: Say, threads: int) -> Round:
    size = (BATCH, SEQ, STEPS, threads)
    found = {"torch": run_worker("torch_step", model, *size, threads=threads)}
    for who, storage, mode in (
        ("fp32", "fp32", "full"),
        ("half_depth", "fp32", "half"),
        ("int8", "int8", "full"),
    ):
        found[who] = run_worker("device_step", artifacts[storage], *size, mode, threads=threads)
    say(", ".join(f"{who} {figures['cold_start_s']:.2f} s" for who, figures in found.items()))
    return found
