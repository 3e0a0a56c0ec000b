"""One fresh process that takes many steps with the exact-k policy at one half; prints one JSON object.

Usage: endure.py ARTIFACT BATCH SEQ STEPS THREADS
"""

import json
import sys
from pathlib import Path

from device_step import draw_data

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.training.budget import resident_mb
from fleetune.device_runtime.training.machine import Machine, Resources


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
