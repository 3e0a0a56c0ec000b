"""One fresh process that trains two epochs by the suffix policy; prints one JSON object.

Usage: epochs.py ARTIFACT FOLDER BATCH SEQ STEPS THREADS DROP CACHE_MB, STEPS of each epoch
"""

import json
import statistics
import sys
from pathlib import Path

from device_step import draw_data

from device_runtime.artifact import open_artifact
from device_runtime.machine import Machine, Resources
from device_runtime.wire import LocalWork, PolicySpec


def main() -> None:
    """Train, and print the median step of each epoch, its first two left out, and what the cache held."""
    folder, cache, *numbers = sys.argv[1:]
    batch, seq, steps, threads = map(int, numbers[:4])
    drop, cache_mb = map(float, numbers[4:])
    artifact = open_artifact(folder)
    data = draw_data(artifact.manifest, batch * steps, seq)
    policy = PolicySpec(name="suffix", drop=drop)
    work = LocalWork(policy=policy, epochs=2, batch_size=batch, seq_len=seq)
    resources = Resources(threads=threads, prefix_cache_mb=cache_mb)
    with Machine(artifact, resources, folder=Path(cache)) as machine:
        trainer = machine.trainer(data, work, artifact.adapter())
        while not trainer.done:
            trainer.step()
        held = sum(path.stat().st_size for path in Path(cache).glob("*")) / 2**20
    seconds = [r.seconds for r in trainer.history]
    first, second = (1e3 * statistics.median(part[2:]) for part in (seconds[:steps], seconds[steps:]))
    print(json.dumps({"first_ms": first, "second_ms": second, "cache_mb": held}))


if __name__ == "__main__":
    main()
