"""A training step of MiniLM, batch 16 x 64, 2 threads, with the frozen weights as fp32, fp16 and int8.

Every figure is the median over interleaved repeats, each repeat a fresh process; ratios are taken pair by pair. The size of the
weights is that of the blocks' frozen tensors, which is what a step reads whole.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_runtime.artifact import open_artifact
from exporters.quantize import BASE_DTYPES
from toolkit.benchmark import run_worker
from toolkit.export import export
from toolkit.models import packaged_model

BATCH, SEQ, STEPS, THREADS, REPEATS = 16, 64, 10, 2, 5
ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """Step time, peak memory and size of the blocks' weights by storage, and ratios to fp32."""
    with tempfile.TemporaryDirectory() as folder:
        artifacts = {name: Path(folder) / name for name in BASE_DTYPES}
        for name, path in artifacts.items():
            export(
                packaged_model(),
                task="sequence-classification",
                num_labels=77,
                base_dtype=name,
                out=path,
                on_progress=say,
            )
        sizes = {name: block_weights_mb(path) for name, path in artifacts.items()}
        rounds = [_round(artifacts, say, i) for i in range(REPEATS)]
    figures = {"benchmark": "base_dtype", "batch": [BATCH, SEQ], "threads": THREADS, "repeats": REPEATS}
    for name in BASE_DTYPES:
        figures[f"{name}_block_weights_mb"] = sizes[name]
        for what in ("step_ms", "peak_mb"):
            figures[f"{name}_{what}"] = round(statistics.median(r[name][what] for r in rounds), 1)
    for name in BASE_DTYPES[1:]:
        pairs = [r[name]["step_ms"] / r["fp32"]["step_ms"] for r in rounds]
        figures[f"step_{name}_over_fp32"] = round(statistics.median(pairs), 3)
        figures[f"block_weights_{name}_over_fp32"] = round(sizes[name] / sizes["fp32"], 3)
    return figures


def block_weights_mb(folder: Path) -> float:
    """Frozen tensors inside the blocks, in MB of 10**6 bytes."""
    rows = [
        t for t in open_artifact(folder, verify=False).manifest.tensors if t.layer >= 0 and not t.trainable
    ]
    total = 0
    for row in rows:
        count = 1
        for extent in row.shape:
            count *= extent
        total += count * ITEM_BYTES[row.dtype]
    return round(total / 1e6, 3)


def _round(
    artifacts: dict[str, Path], say: Callable[[str], None], number: int
) -> dict[str, dict[str, float]]:
    found = {
        name: run_worker("device_step", path, BATCH, SEQ, STEPS, THREADS, "full", threads=THREADS)
        for name, path in artifacts.items()
    }
    shown = ", ".join(f"{name} {figures['step_ms']:.0f} ms" for name, figures in found.items())
    say(f"repeat {number + 1} of {REPEATS}: {shown}")
    return found
