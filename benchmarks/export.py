"""What `fleetune export` takes of the workstation: a fresh process for a 12-layer BERT and for MiniLM, onnx, fp32.

MB are 10**6 bytes. The overhead is what the folder holds beside the raw frozen weights and the adapter: graphs, manifest,
golden step, tokenizer, and padding.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measuring.figures import table
from benchmarks.measuring.subjects import NUM_LABELS, model_of
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.tables import Table
from fleetune.toolkit.benchmark import FOLDER

THREADS = 2
AIMS: Table[dict[str, float]] = Table(
    "model", {"bert": {"seconds": 90, "peak_mb": 3000, "overhead_mb": 3}, "minilm": {}}
)
"""The models, and the most that each figure of them may be."""


def measure(
    say: Callable[[str], None], *, only: Sequence[str] = (), threads: int = THREADS
) -> dict[str, Any]:
    """Wall seconds, peak memory and overhead by model, and whether each aim is kept; ``only`` names models."""
    figures: dict[str, Any] = {"benchmark": "export", "threads": threads}
    rows = []
    with tempfile.TemporaryDirectory() as root:
        for name in [n for n in only if AIMS[n] is not None] or AIMS:
            found = _export(name, Path(root), threads)
            rows.append({"": name, **found})
            kept = {f"{what}_kept": found[what] <= most for what, most in AIMS[name].items()}
            figures |= {f"{name}_{what}": value for what, value in (found | kept).items()}
    for line in table(rows):
        say(line)
    return figures


def folder_overhead(folder: Path) -> int:
    """Bytes of an artifact's folder beside its tensors."""
    rows = open_artifact(folder, verify=False).manifest.tensors
    whole = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return whole - sum(_size_bytes(row.shape, row.dtype) for row in rows)


def _export(name: str, root: Path, threads: int) -> dict[str, float]:
    model, out = model_of(name, root), root / name
    words = ["export", model, "--task", "sequence-classification", "--num-labels", NUM_LABELS, "--out", out]
    seconds, peak_mb = timed([sys.executable, "-m", "fleetune", *map(str, words)], threads)
    return {
        "seconds": round(seconds, 1),
        "peak_mb": round(peak_mb, 1),
        "overhead_mb": round(folder_overhead(out) / 1e6, 3),
    }


def timed(command: list[str], threads: int) -> tuple[float, float]:
    """Wall seconds and peak resident MB of a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(FOLDER.parent)}
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise ConfigError(f"export failed: {(lines or ['no message'])[-1]}")
    return seconds, usage.ru_maxrss * 1024 / 1e6


def _size_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
