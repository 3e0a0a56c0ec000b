"""A dropped layer's weights are not read: the kernel's own page table of a fresh process says so."""

import json
import subprocess
import sys

from pretrained import minilm_artifact

PROBE = """
import json, mmap, struct, sys
import numpy as np
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine.backends import open_engine

artifact = open_artifact(sys.argv[1])
dropped = json.loads(sys.argv[2])
ids = np.full((2, 8), 2000)
batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids), "labels": np.zeros(2, int)}
with open_engine(artifact, threads=1) as stack:
    stack.step(batch, dropping(6, dropped), artifact.adapter())
shares = []
with open("/proc/self/pagemap", "rb", 0) as pagemap:
    for layer in range(6):
        rows = [t for t in artifact.manifest.tensors if t.layer == layer and not t.trainable]
        start = min(artifact.base(t).ctypes.data for t in rows) // mmap.PAGESIZE
        end = max(artifact.base(t).ctypes.data + artifact.base(t).nbytes for t in rows) // mmap.PAGESIZE
        pagemap.seek(8 * start)
        entries = struct.unpack(f"<{end - start}Q", pagemap.read(8 * (end - start)))
        shares.append(sum(entry >> 63 for entry in entries) / len(entries))
print(json.dumps(shares))
"""


def resident_shares(dropped: list[int]) -> list[float]:
    command = [sys.executable, "-c", PROBE, str(minilm_artifact(77)), json.dumps(dropped)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_only_active_layers_are_mapped_in() -> None:
    shares = resident_shares([1, 3, 4])
    assert all(shares[layer] == 1.0 for layer in (0, 2, 5))
    assert all(
        shares[layer] < 0.03 for layer in (1, 3, 4)
    )  # the kernel maps up to 64 KiB around a neighbour's page
