"""One fresh process that trains some epochs by a policy that keeps all layers running; prints one JSON object.

Usage: epochs.py ARTIFACT FOLDER BATCH SEQ STEPS THREADS EPOCHS CACHE_MB POLICY DROP, STEPS of each epoch. A block that moves
stays for two epochs.
"""

import json
import statistics
import sys
from pathlib import Path

from device_step import draw_data

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.methods.policies import POLICIES
from fleetune.device_runtime.training.machine import Machine, Resources


def main() -> None:
    """Train, and print the median step of each epoch, its first two left out, and what the cache held."""
    folder, cache, *numbers, name, drop = sys.argv[1:]
    batch, seq, steps, threads, epochs, cache_mb = map(int, numbers)
    artifact = open_artifact(folder)
    data = draw_data(artifact.manifest, batch * steps, seq)
    policy = PolicySpec(
        name=name, drop=float(drop), period=2 * steps if "period" in POLICIES[name].uses else 0
    )
    work = LocalWork(policy=policy, epochs=epochs, batch_size=batch, seq_len=seq)
    resources = Resources(threads=threads, hidden_cache_mb=cache_mb)
    with Machine(artifact, resources, folder=Path(cache)) as machine:
        trainer = machine.trainer(data, work, artifact.adapter())
        while not trainer.done:
            trainer.step()
        held = sum(path.stat().st_size for path in Path(cache).glob("*")) / 2**20
    seconds = [r.seconds for r in trainer.history]
    medians = [1e3 * statistics.median(seconds[i + 2 : i + steps]) for i in range(0, len(seconds), steps)]
    print(json.dumps({"epoch_ms": medians, "cache_mb": held}))


if __name__ == "__main__":
    main()
