"""Language models of published shapes with random weights, 4 x 128 tokens, LoRA r=8: artifact, least memory budget, peak, step.

MB are 10**6 bytes, peaks the kernel's of a whole process. What runs beside torch + peft (fp32) runs in turns with it, each in a
fresh process; ratios are taken pair by pair. A shape of 3 billion is measured only when it is asked for: it takes 26 GB.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.export import timed
from benchmarks.measuring.figures import Round, medians, ratio, table
from benchmarks.measuring.processes import run_worker
from fleetune.device_runtime.tables import Table

BATCH, SEQ, THREADS, REPEATS = 4, 128, 2, 1
STEPS = {"1b": 2, "3b": 2}
"""Of each process; of the smaller shapes three. What is timed comes after the first two, or is the last."""
SHAPES = Table("shape", {"135m": 0, "270m": 0, "0.5b": 700, "1b": 1000, "3b": 0})
"""Budget in MB that each is tried with; 0 for its least."""
_LARGEST = "3b"
STORAGES = ("int8", "int4")
Say = Callable[[str], None]


def measure(
    say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS, threads: int = THREADS
) -> dict[str, Any]:
    """One row per shape and storage; ``only`` names shapes."""
    rows: list[dict[str, Any]] = []
    for name in [name for name in only if SHAPES[name] is not None] or [n for n in SHAPES if n != _LARGEST]:
        with tempfile.TemporaryDirectory() as root:
            rows += _of(name, Path(root), say, repeats, threads)
    for line in table([{n: v for n, v in row.items() if n != "picked"} for row in rows]):
        say(line)
    return {"benchmark": "llm", "threads": threads, "repeats": repeats, "rows": rows}


def _of(name: str, root: Path, say: Say, repeats: int, threads: int) -> list[dict[str, Any]]:
    model, size = root / "model", (BATCH, SEQ, STEPS.get(name, 3), threads)
    fp32_mb = 4e-6 * run_worker("make_language_model", name, model, threads=threads)["parameters"]
    made = {storage: _exported(model, root / storage, storage, threads) for storage in STORAGES}
    words = {storage: (root / storage, root / "cache", *size) for storage in STORAGES}
    least = {
        storage: run_worker("budget_run", *words[storage], 0, threads=threads)["least_mb"]
        for storage in STORAGES
    }
    say(f"{name}: {made}, least budgets {least}")
    rounds: list[Round] = []
    picked: dict[str, str] = {}
    for _ in range(repeats):
        found = {"torch": run_worker("torch_language_step", model, *size, threads=threads)}
        for storage in STORAGES:
            budget_mb = max(SHAPES[name], least[storage] + 1)
            found[storage] = run_worker("budget_run", *words[storage], budget_mb, threads=threads)
            picked[storage] = str(found[storage].pop("picked"))
        rounds.append(found)
        say(", ".join(f"{who} {f['step_ms'] / 1e3:.1f} s, {f['peak_mb']:.0f} MB" for who, f in found.items()))
    seen = medians(rounds)
    return [
        {
            "case": f"{name} {storage}",
            **made[storage],
            "artifact_over_fp32": round(made[storage]["artifact_mb"] / fp32_mb, 3),
            "export_peak_over_fp32": round(made[storage]["export_peak_mb"] / fp32_mb, 2),
            "least_budget_mb": least[storage],
            "budget_mb": max(SHAPES[name], least[storage] + 1),
            "peak_mb": seen[f"{storage}_peak_mb"],
            "peak_over_torch": ratio(rounds, storage, "torch", what="peak_mb"),
            "step_s": round(seen[f"{storage}_step_ms"] / 1e3, 2),
            "step_over_torch": ratio(rounds, storage, "torch"),
            "first_step_s": round(seen[f"{storage}_cold_start_s"], 1),
            "first_step_over_torch": ratio(rounds, storage, "torch", what="cold_start_s"),
            "picked": picked[storage],
        }
        for storage in STORAGES
    ]


def _exported(model: Path, out: Path, storage: str, threads: int) -> dict[str, float]:
    fleetune = [sys.executable, "-m", "fleetune"]
    words = ["export", str(model), "--task", "causal-lm", "--base-dtype", storage, "--out", str(out)]
    seconds, peak_mb = timed([*fleetune, *words], threads)
    _, checking_mb = timed([*fleetune, "selfcheck", str(out)], threads)
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "artifact_mb": round(whole / 1e6, 1),
        "export_s": round(seconds, 1),
        "export_peak_mb": round(peak_mb),
        "selfcheck_peak_mb": round(checking_mb),
    }
