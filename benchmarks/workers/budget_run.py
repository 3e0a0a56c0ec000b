"""One fresh process that trains within a memory budget; prints one JSON object.

Usage: budget_run.py ARTIFACT FOLDER BATCH SEQ STEPS THREADS BUDGET_MB. With a budget of 0 nothing is run: it prints the least
budget that would do, and one that is plenty.
"""

import json
import re
import statistics
import sys
import time
from pathlib import Path

from device_step import draw_data

from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.training.machine import Machine, Resources


def main() -> None:
    """Train, and print step time, peak and what was picked."""
    folder, cache, *numbers = sys.argv[1:]
    batch, seq, steps, threads = map(int, numbers[:4])
    artifact = open_artifact(folder)
    data = draw_data(artifact.manifest, batch * steps, seq)
    work = LocalWork(steps=steps, batch_size=batch, seq_len=seq)

    def run(budget_mb: float) -> dict[str, object]:
        with Machine(
            artifact, Resources(threads=threads, memory_budget_mb=budget_mb), folder=Path(cache)
        ) as machine:
            trainer = machine.trainer(data, work, artifact.adapter())
            assert machine.fit is not None
            if budget_mb > _PLENTY / 2:
                return {"plenty_mb": machine.fit.expected_mb}
            trainer.step()
            first_done = time.time()
            while not trainer.done:
                trainer.step()
            seconds = statistics.median(r.seconds for r in trainer.history[min(2, steps - 1) :])
            return {
                "step_ms": 1e3 * seconds,
                "peak_mb": peak_rss_mb() * 2**20 / 1e6,
                "picked": str(machine.fit),
                "first_done": first_done,
            }

    budget_mb = float(numbers[4])
    print(json.dumps(run(budget_mb) if budget_mb else {**run(_PLENTY), "least_mb": _least(run)}))


def _least(run) -> float:  # type: ignore[no-untyped-def]
    try:
        run(1.0)
    except ConfigError as refused:
        return float(re.findall(r"would do is (\d+) MB", str(refused))[0])
    raise AssertionError("one megabyte was enough")


_PLENTY = 1e6

if __name__ == "__main__":
    main()
