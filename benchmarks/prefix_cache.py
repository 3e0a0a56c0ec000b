"""Suffix training of half the layers with the cached prefix: time of an epoch, first and later, and without the cache.

``cached_over_full``: a later epoch against training all layers. The least that arithmetic allows for ``second_over_first`` is
two thirds: six forwards and three backwards of MiniLM's layers become three and three.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.benchmark import run_worker
from toolkit.export import export
from toolkit.figures import Round, chart_of, medians, ratio
from toolkit.models import packaged_model

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 16, 2, 3
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """Milliseconds of a step, by epoch."""
    with tempfile.TemporaryDirectory() as root:
        artifact = Path(root) / "artifact"
        export(packaged_model(), task="sequence-classification", num_labels=77, out=artifact, on_progress=say)
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
        "chart": chart_of(
            "epoch",
            [
                {"epoch": who, "step_ms": found[f"{who}_step_ms"]}
                for who in ("full", "uncached", "first", "second")
            ],
            "step_ms",
        ),
    }


def _round(artifact: Path, root: Path, say: Say, threads: int) -> Round:
    found = {}
    for who, drop, cache_mb in (("full", 0.0, 0), ("uncached", 0.5, 0), ("cached", 0.5, 1000)):
        words = (artifact, root / "cache", BATCH, SEQ, STEPS, threads, drop, cache_mb)
        made = run_worker("epochs", *words, threads=threads)
        found |= (
            {who: {"step_ms": made["first_ms"]}}
            if who != "cached"
            else {
                "first": {"step_ms": made["first_ms"]},
                "second": {"step_ms": made["second_ms"], "cache_mb": made["cache_mb"]},
            }
        )
    say(", ".join(f"{who} {figures['step_ms']:.0f} ms" for who, figures in found.items()))
    return found
