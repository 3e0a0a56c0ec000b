"""Ten thousand steps of MiniLM at batch 4 x 32 in one process: does resident memory grow after the first hundred?"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of

BATCH, SEQ, STEPS, THREADS = 4, 32, 10_000, 2


def measure(say: Callable[[str], None], *, threads: int = THREADS) -> dict[str, Any]:
    """``growth``: share by which memory grew from step 100 to the last."""
    with tempfile.TemporaryDirectory() as root:
        artifact = artifact_of("minilm", Path(root), say=say)
        found = run_worker("endure", artifact, BATCH, SEQ, STEPS, threads, threads=threads)
    for step, resident_mb in found["resident_mb"]:
        say(f"step {step}: {resident_mb:.1f} MB")
    first, last = found["resident_mb"][0][1], found["resident_mb"][-1][1]
    return {
        "benchmark": "endurance",
        "batch": [BATCH, SEQ],
        "threads": threads,
        **found,
        "growth": round(last / first - 1, 4),
    }
