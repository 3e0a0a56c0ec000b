"""One fresh process that trains on the device runtime, on any backend's artifact; prints one JSON object.

Usage: device_step.py ARTIFACT BATCH SEQ STEPS THREADS MODE. MODE is words with hyphens between them: ``full``, ``half`` or
``active:N`` (the N lowest layers), and of a memory plan ``recompute``, ``saved:N``, ``streamed``, ``micro:N``.
"""

import json
import math
import statistics
import sys
import time
import zlib
from pathlib import Path

import numpy as np

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, dropping
from fleetune.device_runtime.contracts.work import OptimizerSpec
from fleetune.device_runtime.data.samples import Dataset, Dense, make_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.methods.optim import make_optimizer


def plan_of(mode: str, num_layers: int) -> LayerPlan:
    """``active:N`` keeps the N lowest layers, ``half`` every second one, anything else all."""
    words = _words(mode)
    if "active" in words:
        return dropping(num_layers, range(words["active"], num_layers))
    return dropping(num_layers, range(1, num_layers, 2) if "half" in words else ())


def memory_of(mode: str) -> MemoryPlan:
    """The memory plan in it."""
    words = _words(mode)
    saved = 0 if "recompute" in words else words.get("saved")
    return MemoryPlan(words.get("micro", 0), saved, "streamed" in words)


def _words(mode: str) -> dict[str, int]:
    parts = (word.partition(":") for word in mode.split("-"))
    return {name: int(number or 0) for name, _, number in parts}


def draw_batch(manifest: Manifest, batch_size: int, seq_len: int) -> Arrays:
    """Random ids and labels of what the model takes, nothing padded."""
    rng, extents = np.random.default_rng(0), {"batch": batch_size, "seq": seq_len}
    tables = [t.shape for t in manifest.tensors if t.layer < 0 and len(t.shape) > 1]
    vocabulary = max(tables, key=math.prod)[0]
    classes = len(manifest.labels) or vocabulary
    highest = {"input_ids": vocabulary, manifest.label_name: classes, "attention_mask": 2}
    lowest = {"input_ids": vocabulary // 20, "attention_mask": 1}
    return {
        row.name: rng.integers(
            lowest.get(row.name, 0),
            highest.get(row.name, 1),
            tuple(extents[d] if isinstance(d, str) else d for d in row.shape),
        )
        for row in manifest.inputs
    }


def draw_data(manifest: Manifest, num_rows: int, seq_len: int) -> Dataset:
    """The same as a data set."""
    columns = {name: Dense(values) for name, values in draw_batch(manifest, num_rows, seq_len).items()}
    lengths = np.full(num_rows, seq_len)
    return make_dataset(
        columns,
        lengths,
        seq_len=seq_len,
        num_classes=len(manifest.labels),
        label_name=manifest.label_name,
    )


def main() -> None:
    """Train, and print step time, peak memory and the time of the first finished step."""
    folder, batch_size, seq_len, steps, threads, mode = sys.argv[1:]
    artifact = open_artifact(folder)
    adapter = artifact.adapter()
    batch = draw_batch(artifact.manifest, int(batch_size), int(seq_len))
    optimizer = make_optimizer(OptimizerSpec(lr=1e-3), total_steps=int(steps))
    state = optimizer.init(adapter)
    seconds = []
    with open_engine(artifact, threads=int(threads), memory=memory_of(mode)) as engine:
        plan = plan_of(mode, artifact.manifest.num_layers)
        for _ in range(int(steps)):
            start = time.perf_counter()
            result = engine.step(batch, plan, adapter)
            adapter, state = optimizer.update(result.grads, state, adapter)
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                first_done = time.time()
    found = {"step_ms": 1e3 * statistics.median(seconds[2:]), "first_done": first_done, **memory()}
    print(
        json.dumps({**found, "checksum": zlib.crc32(b"".join(adapter[n].tobytes() for n in sorted(adapter)))})
    )


def memory() -> dict[str, float]:
    """Peak resident memory, and what of the weights file is mapped in, in MB of 2**20 bytes."""
    status = Path("/proc/self/status").read_text()
    mapped = 0
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith("base.safetensors")
        elif ours and line.startswith("Rss:"):
            mapped += int(line.split()[1])
    return {"peak_mb": int(status.split("VmHWM:")[1].split()[0]) / 1024, "mapped_weights_mb": mapped / 1024}


if __name__ == "__main__":
    main()
