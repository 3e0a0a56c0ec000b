"""The aggregator of ``benchmarks/crowd.py`` in a process of its own, with its ledger on disk; prints one JSON object at the end.

Usage: crowd.py URL MB COUNT ROUNDS FOLDER. Says ``hellos`` when a third of the devices were heard. The first round, in which
nothing is fetched, is in none of the figures but ``first_s``.
"""

import json
import resource
import statistics
import sys
import time
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.link import Link, Will

JOB, ARTIFACT = "crowd", "a" * 64


def adapter_of(size_mb: float) -> dict[str, np.ndarray]:
    """Version 0, float32 by name."""
    return {"w": np.zeros((8, max(1, int(size_mb * 1e6 / 32))), np.float32)}


def main(url: str, size_mb: str, count: str, rounds: str, folder: str) -> None:
    """Run a job, and print what its rounds took."""
    num_devices, num_rounds = int(count), int(rounds) + 1
    settings = Settings(
        job=JOB,
        artifact=ARTIFACT,
        rounds=num_rounds,
        clients=num_devices,
        min_clients=num_devices,
        work=LocalWork(steps=1),
        down_codec="whole",
    )
    link = Link(url, client_id="aggregator", topics=topics(JOB), will=Will(*will(JOB, "s")))
    marks = []

    def mark(row: object = None) -> None:
        cpu_s = time.process_time()
        marks.append((time.perf_counter(), cpu_s, link.bytes_sent, link.messages_sent, counts["received"]))

    counts = {"received": 0}
    with Ledger(Path(folder), settings) as ledger, link:
        mark()
        service = Service(
            link,
            ledger,
            settings,
            patience=Patience(deadline_s=0),
            adapter=adapter_of(float(size_mb)),
            session="s",
            now=time.monotonic(),
            on_row=lambda row: mark() if row.round else None,
        )
        heard: set[str] = set()
        service.tick(time.monotonic())
        while not service.finished:
            if message := link.receive(0.1):
                counts["received"] += 1
                if len(heard) < num_devices / 3:
                    heard.add(message[0])
                    if len(heard) >= num_devices / 3:
                        print("hellos", flush=True)
                service.take(*message, time.monotonic(), has_more=link.has_waiting)
            if service.due_at(now := time.monotonic()) <= now:
                service.tick(now)
        figures = _figures(marks)
        service.stop(time.monotonic())
        last = (Path(folder) / "versions" / f"{num_rounds:05d}.safetensors").read_bytes()
        figures |= {
            "connections": link.connections,
            "dropped": link.dropped,
            "digest": sha256(last).hexdigest()[:16],
        }
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures), flush=True)


def _figures(marks: list[tuple[float, ...]]) -> dict[str, float]:
    took = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairwise(marks)]
    wall_s, cpu_s, sent, messages, received = (
        statistics.median(column) for column in zip(*took[1:], strict=True)
    )
    return {
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "sent_mb": sent / 1e6,
        "messages_sent": messages,
        "messages_received": received,
        "first_s": took[0][0],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
