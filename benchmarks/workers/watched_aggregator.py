"""An aggregator that waits for one device more than there are: says its CPU seconds for each line of standard input.

Usage: watched_aggregator.py URL DEVICES
"""

import sys
import threading
import time
from math import inf

import numpy as np

from benchmarks.rounds import ARTIFACT, JOB
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.link import Link, Will


def main() -> None:
    """Serve until standard input ends."""
    url, devices = sys.argv[1], int(sys.argv[2])
    fields = {
        "job": JOB,
        "artifact": ARTIFACT,
        "rounds": 1,
        "clients": devices + 1,
        "min_clients": devices + 1,
    }
    settings = Settings(**fields, work=LocalWork(steps=1))
    link = Link(url, client_id="aggregator", topics=topics(JOB), will=Will(*will(JOB, "one")))
    link.open(20)
    adapter = {"w": np.zeros(10, np.float32)}
    service = Service(
        link,
        MemoryStore(),
        settings,
        patience=Patience(),
        adapter=adapter,
        session="one",
        now=time.monotonic(),
    )
    threading.Thread(target=_answer, args=(service,), daemon=True).start()
    service.tick(time.monotonic())
    while True:
        if message := link.receive(0.1):
            service.take(*message, time.monotonic())
        if service.due_at(now := time.monotonic()) <= now < inf:
            service.tick(now)


def _answer(service: Service) -> None:
    for _ in sys.stdin:
        sys.stdout.write(f"{time.process_time()} {len(service.federation.rounds.roster)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
