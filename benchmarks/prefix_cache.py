"""Suffix training of half the layers with the hidden cache: time of an epoch, first and later, and without the cache.

``cached_over_full``: a later epoch against training all layers. The least that arithmetic allows for ``second_over_first`` is
two thirds: six forwards and three backwards of MiniLM's layers become three and three.

``successive`` trains blocks of two layers for two epochs each: ``block1`` to ``block3`` are the second epochs. By arithmetic they
take 1, two thirds and one third of a step that trains all layers: six, four and two layers there and back.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 16, 2, 3
CACHE_MB = 1000
BLOCKS = ("block1", "block2", "block3")
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """Milliseconds of a step, by epoch."""
    with tempfile.TemporaryDirectory() as root:
        artifact = artifact_of("minilm", Path(root), say=say)
        rounds = [_round(artifact, Path(root), say, threads) for _ in range(repeats)]
    found = medians(rounds)
    return {
        "benchmark": "prefix-cache",
        "batch": [BATCH, SEQ],
        "threads": threads,
        "repeats": repeats,
        **found,
        "second_over_first": ratio(rounds, "second", "first"),
        "second_over_uncached": ratio(rounds, "second", "uncached"),
        "cached_over_full": ratio(rounds, "second", "full"),
        "successive_over_full": [ratio(rounds, block, "full") for block in BLOCKS],
        "chart": chart_of(
            "epoch",
            [
                {"epoch": who, "step_ms": found[f"{who}_step_ms"]}
                for who in ("full", "uncached", "first", "second", *BLOCKS)
            ],
            "step_ms",
        ),
    }


def _round(artifact: Path, root: Path, say: Say, threads: int) -> Round:
    def run(epochs: int, cache_mb: int, policy: str, drop: float) -> dict[str, Any]:
        words = (artifact, root / "cache", BATCH, SEQ, STEPS, threads, epochs, cache_mb, policy, drop)
        return run_worker("epochs", *words, threads=threads)

    found = {
        "full": {"step_ms": run(1, 0, "full", 0)["epoch_ms"][0]},
        "uncached": {"step_ms": run(1, 0, "suffix", 1 / 2)["epoch_ms"][0]},
    }
    cached = run(2, CACHE_MB, "suffix", 1 / 2)
    moved = run(2 * len(BLOCKS), CACHE_MB, "successive", 2 / 3)
    epochs = zip(("first", "second", *BLOCKS), (*cached["epoch_ms"], *moved["epoch_ms"][1::2]), strict=True)
    found |= {who: {"step_ms": step_ms} for who, step_ms in epochs}
    found["second"]["cache_mb"] = cached["cache_mb"]
    say(", ".join(f"{who} {figures['step_ms']:.0f} ms" for who, figures in found.items()))
    return found
