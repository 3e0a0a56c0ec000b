"""Ten memory budgets between the least and plenty, three models: is the peak within each, and does throughput grow with it?

MB are 10**6 bytes, as `--memory-budget-mb` counts them; the peak is the kernel's, of the whole process.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of
from fleetune.device_runtime.tables import Table

STEPS, THREADS, BUDGETS = 5, 2, 10
SIZES = Table(
    "model",
    {
        "minilm": (16, 64),
        "bert": (8, 128),
        "stories": (16, 128),
    },
)
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), threads: int = THREADS) -> dict[str, Any]:
    """One row per model and budget; ``only`` names models."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for name in [name for name in only if SIZES[name]] or list(SIZES):
            rows += _of(name, Path(root), say, threads)
    for line in table([{n: v for n, v in row.items() if n != "picked"} for row in rows]):
        say(line)
    return {
        "benchmark": "budget",
        "threads": threads,
        "kept": all(row["peak_mb"] <= row["budget_mb"] for row in rows),
        "worst_peak_over_budget": max(row["peak_over_budget"] for row in rows),
        "rows": rows,
    }


def _of(name: str, root: Path, say: Say, threads: int) -> list[dict[str, Any]]:
    batch, seq = SIZES[name]
    artifact = artifact_of(name, root, say=say)
    words = (artifact, root / "cache", batch, seq, STEPS, threads)
    ends = run_worker("budget_run", *words, 0, threads=threads)
    least, plenty = ends["least_mb"], 1.15 * ends["plenty_mb"]
    rows = []
    for i in range(BUDGETS):
        budget_mb = round(least + (plenty - least) * (i / (BUDGETS - 1)) ** 2 + 1)
        found = run_worker("budget_run", *words, budget_mb, threads=threads)
        rows.append(
            {
                "case": f"{name} {batch} x {seq}",
                "budget_mb": budget_mb,
                "peak_mb": round(found["peak_mb"], 1),
                "peak_over_budget": round(found["peak_mb"] / budget_mb, 3),
                "rows_per_s": round(1e3 * batch / found["step_ms"], 1),
                "picked": found["picked"],
            }
        )
        say(
            f"{name}: budget {budget_mb} MB, peak {found['peak_mb']:.0f} MB, {rows[-1]['rows_per_s']} rows a second"
        )
    return rows
