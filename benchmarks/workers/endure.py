"""One fresh process that takes many steps with the exact-k policy at one half; prints one JSON object.

Usage: endure.py ARTIFACT BATCH SEQ STEPS THREADS
"""

import json
import sys
from pathlib import Path

from device_step import draw_data

from device_runtime.artifact import open_artifact
from device_runtime.budget import resident_mb
from device_runtime.machine import Machine, Resources
from device_runtime.wire import LocalWork, PolicySpec


def main() -> None:
    """Train, and print resident memory as it goes: a list of (step, 10**6 bytes)."""
    folder, *numbers = sys.argv[1:]
    batch, seq, steps, threads = map(int, numbers)
    artifact = open_artifact(folder)
    data = draw_data(artifact.manifest, 32 * batch, seq)
    work = LocalWork(policy=PolicySpec(name="exact-k", drop=0.5), steps=steps, batch_size=batch, seq_len=seq)
    seen = []
    with Machine(artifact, Resources(threads=threads), folder=Path(folder)) as machine:
        trainer = machine.trainer(data, work, artifact.adapter())
        while not trainer.done:
            trainer.step()
            if trainer.step_index == 100 or trainer.step_index % 1000 == 0:
                seen.append((trainer.step_index, resident_mb()))
    print(json.dumps({"steps": steps, "resident_mb": seen}))


if __name__ == "__main__":
    main()
