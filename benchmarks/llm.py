"""Language models of published shapes with random weights, 4 x 128 tokens, LoRA r=8: from checkpoint to merged model.

Export, artifact, selfcheck, least memory budget, peak, step, merge. MB are 10**6 bytes, peaks the kernel's of a whole process.
What runs beside torch + peft (fp32) runs in turns with it, each in a fresh process; ratios are taken pair by pair. A shape of 3
billion is measured only when it is asked for: its export alone takes 27 GB of disk meanwhile. Where torch's would not fit the
machine, it is not run.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export import timed
from benchmarks.measuring.figures import Round, medians, ratio, table
from benchmarks.measuring.processes import run_worker
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.errors import UnknownName, choices

BATCH, SEQ, THREADS, REPEATS = 4, 128, 2, 3
STEPS = {"1b": 2, "3b": 2}
"""Of each process; of the smaller shapes three. What is timed comes after the first two, or is the last."""
SHAPES = {"135m": 0, "270m": 0, "0.5b": 700, "1b": 1000, "3b": 0}
"""Budget in MB that each is tried with beside its least, if that is less; 0 for its least alone."""
HALF = ("1b", "3b")
"""Shapes whose checkpoint is in bfloat16, as all of these are published; the others' are in float32."""
_LARGEST = "3b"
STORAGES = ("int8", "int4")
_TORCH_TIMES = 1.6
"""What torch takes, at most, to its weights: it keeps all activations."""
Say = Callable[[str], None]


def measure(
    say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS, threads: int = THREADS
) -> dict[str, Any]:
    """One row per shape and storage; ``only`` names shapes and storages."""
    known = (*SHAPES, *STORAGES)
    if unknown := [name for name in only if name not in known]:
        raise UnknownName(f"no shape or storage {unknown[0]!r}; have: {choices(known)}")
    storages = [name for name in STORAGES if name in only] or STORAGES
    rows: list[dict[str, Any]] = []
    for name in [n for n in SHAPES if n in only] or [n for n in SHAPES if n != _LARGEST]:
        with tempfile.TemporaryDirectory() as root:
            rows += _of(name, storages, Path(root), say, repeats, threads)
    for line in table([{n: v for n, v in row.items() if n != "picked"} for row in rows]):
        say(line)
    return {"benchmark": "llm", "threads": threads, "repeats": repeats, "rows": rows}


def _of(
    name: str, storages: Sequence[str], root: Path, say: Say, repeats: int, threads: int
) -> list[dict[str, Any]]:
    model, size = root / "model", (BATCH, SEQ, STEPS.get(name, 3), threads)
    dtype = "bfloat16" if name in HALF else "float32"
    parameters = run_worker("make_language_model", name, model, dtype, threads=threads)["parameters"]
    fp32_mb = 4e-6 * parameters
    made = {storage: _exported(model, root / storage, storage, threads) for storage in storages}
    words = {storage: (root / storage, root / "cache", *size) for storage in storages}
    least = {
        storage: run_worker("budget_run", *words[storage], 0, threads=threads)["least_mb"]
        for storage in storages
    }
    say(f"{name}: {made}, least budgets {least}")
    rounds: list[Round] = []
    picked: dict[str, str] = {}
    for _ in range(repeats):
        found = {}
        if fp32_mb * _TORCH_TIMES < _memory_mb():
            found["torch"] = run_worker("torch_language_step", model, *size, threads=threads)
        for storage in storages:
            budget_mb = max(SHAPES[name], least[storage])
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
            "budget_mb": max(SHAPES[name], least[storage]),
            "peak_mb": seen[f"{storage}_peak_mb"],
            "peak_over_torch": ratio(rounds, storage, "torch", what="peak_mb"),
            "step_s": round(seen[f"{storage}_step_ms"] / 1e3, 2),
            "step_over_torch": ratio(rounds, storage, "torch"),
            "first_step_s": round(seen[f"{storage}_cold_start_s"], 1),
            "first_step_over_torch": ratio(rounds, storage, "torch", what="cold_start_s"),
            "picked": picked[storage],
        }
        for storage in storages
    ]


def _exported(model: Path, out: Path, storage: str, threads: int) -> dict[str, float]:
    fleetune = [sys.executable, "-m", "fleetune"]
    words = ["export", str(model), "--task", "causal-lm", "--base-dtype", storage, "--out", str(out)]
    seconds, peak_mb = timed([*fleetune, *words], threads)
    _, checking_mb = timed([*fleetune, "selfcheck", str(out)], threads)
    tuned, merged = _tuned(out), out.with_name("merged")
    merging_s, merging_mb = timed([*fleetune, "merge", str(tuned), "--full", "--out", str(merged)], threads)
    whole = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {
        "artifact_mb": round(whole / 1e6, 1),
        "export_s": round(seconds, 1),
        "export_peak_mb": round(peak_mb),
        "selfcheck_peak_mb": round(checking_mb),
        "merge_s": round(merging_s, 1),
        "merge_peak_mb": round(merging_mb),
    }


def _tuned(folder: Path) -> Path:
    """A PEFT folder beside the artifact, of an adapter that has learnt something."""
    artifact, rng = open_artifact(folder), np.random.default_rng(0)
    learnt = {
        name: value + rng.normal(0, 0.01, value.shape).astype(value.dtype)
        for name, value in artifact.adapter().items()
    }
    out = folder.with_name(f"{folder.name}-adapter")
    save_peft(out, artifact.manifest, learnt)
    return out


def _memory_mb() -> float:
    """Of the machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e6
