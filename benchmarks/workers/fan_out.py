"""The aggregator of ``benchmarks/fan_out.py`` in a process of its own; prints one JSON object with means of a round.

Usage: fan_out.py URL MB COUNT ROUNDS SHARE. The first round, in which nothing is fetched, is left out.
"""

import json
import resource
import sys
import time

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.link import Link, Will

JOB, ARTIFACT = "fan-out", "a" * 64
RATIO = 1e-4
"""Share of an update that travels up."""


def adapter_of(size_mb: float) -> dict[str, np.ndarray]:
    """Version 0, float32 by name."""
    return {"w": np.zeros((8, int(size_mb * 1e6 / 32)), np.float32)}


def main(url: str, size_mb: str, count: str, rounds: str, share: str) -> None:
    """Run a job, and print what its rounds took."""
    work = LocalWork(steps=1, codec="topk", codec_ratio=RATIO)
    settings = Settings(
        job=JOB,
        artifact=ARTIFACT,
        rounds=int(rounds) + 1,
        clients=int(count),
        min_clients=int(count),
        work=work,
        down_codec="whole",
    )
    marks = []
    with Link(url, client_id="aggregator", topics=topics(JOB), will=Will(*will(JOB, "s"))) as link:

        def mark(row: object = None) -> None:
            marks.append((time.perf_counter(), time.process_time(), link.bytes_sent, link.messages_sent))

        service = Service(
            link,
            MemoryStore(),
            settings,
            patience=Patience(deadline_s=0, share=share == "1"),
            adapter=adapter_of(float(size_mb)),
            session="s",
            now=time.monotonic(),
            on_row=mark,
        )
        while not service.finished:
            wait_s = min(max(service.due_at(time.monotonic()) - time.monotonic(), 0.0), 0.1)
            if message := link.receive(wait_s):
                service.take(*message, time.monotonic())
            service.tick(time.monotonic())
        dropped = link.dropped
    took = [
        (after - before) / int(rounds)
        for before, after in zip(marks[-int(rounds) - 1], marks[-1], strict=True)
    ]
    wall_s, cpu_s, sent, messages = took
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figures = {"cpu_s": cpu_s, "wall_s": wall_s, "sent_mb": sent / 1e6, "messages": messages}
    print(json.dumps({**figures, "dropped": dropped, "peak_mb": peak_mb}))


if __name__ == "__main__":
    main(*sys.argv[1:])
