"""A training step of MiniLM, batch 16 x 64, 2 threads, with the frozen weights as fp32, fp16, int8 and int4.

Every figure is the median over interleaved repeats, each repeat a fresh process; ratios are taken pair by pair. The size of the
weights is that of the blocks' frozen tensors, which is what a step reads whole.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, medians, ratio
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.exporters.storages import BASE_DTYPES

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 10, 2, 5
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS, threads: int = THREADS) -> dict[str, Any]:
    """Step time, peak memory and size of the blocks' weights by storage, and ratios to fp32."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {
            name: artifact_of("minilm", Path(folder), base_dtype=name, say=say) for name in BASE_DTYPES
        }
        sizes = {name: block_weights_mb(path) for name, path in artifacts.items()}
        rounds = [_round(artifacts, say, threads) for _ in range(repeats)]
    figures: dict[str, Any] = {"benchmark": "base_dtype", "batch": [BATCH, SEQ], "threads": threads}
    figures |= {"repeats": repeats, **medians(rounds, digits=1)}
    figures |= {f"{name}_block_weights_mb": size for name, size in sizes.items()}
    for name in BASE_DTYPES[1:]:
        figures[f"step_{name}_over_fp32"] = ratio(rounds, name, "fp32")
        figures[f"peak_{name}_over_fp32"] = ratio(rounds, name, "fp32", what="peak_mb")
        figures[f"block_weights_{name}_over_fp32"] = round(sizes[name] / sizes["fp32"], 3)
    return figures


def block_weights_mb(folder: Path) -> float:
    """Frozen tensors inside the blocks, in MB of 10**6 bytes."""
    rows = open_artifact(folder, verify=False).manifest.tensors
    inside = [row for row in rows if row.layer >= 0 and not row.trainable]
    return round(sum(row.size_bytes for row in inside) / 1e6, 3)


def _round(artifacts: dict[str, Path], say: Say, threads: int) -> Round:
    found = {
        name: run_worker("device_step", path, BATCH, SEQ, STEPS, threads, "full", threads=threads)
        for name, path in artifacts.items()
    }
    say(", ".join(f"{name} {figures['step_ms']:.0f} ms" for name, figures in found.items()))
    return found
