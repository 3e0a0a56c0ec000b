"""One fresh process with many agents and their aggregator on a loopback, under a pretended clock; prints one JSON object.

Usage: many_agents.py COUNT. Everyone keeps what it keeps in memory.
"""

import json
import os
import resource
import statistics
import sys
import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.loopback import Loopback, LoopbackLink
from fleetune.device_runtime.network.turns import Turns

JOB, ARTIFACT, ROUNDS = "many", "a" * 64, 4
ADAPTER = {
    "blocks.0.lora_A": np.full((8, 562), 0.01, np.float32),
    "blocks.0.lora_B": np.full((562, 8), 0.01, np.float32),
}
"""36 kB."""


class Step(NamedTuple):
    """A step that took no time."""

    loss: float = 1.0
    active_layers: int = 1
    seconds: float = 0.0


class Training:
    """One step, which adds a number to the adapter."""

    def __init__(self, work, adapter):
        self.adapter, self.work, self.history, self.stats = adapter, work, [], {}
        self.effective_samples = float("inf")

    @property
    def step_index(self):
        """Steps done."""
        return len(self.history)

    @property
    def done(self):
        """Whether the step is done."""
        return bool(self.history)

    def step(self):
        """Do it."""
        self.adapter = {name: value + np.float32(1e-3) for name, value in self.adapter.items()}
        self.history.append(Step())
        return self.history[-1]

    def save(self, path):
        """Refuse: an agent that never pauses needs no checkpoint."""
        raise NotImplementedError("no checkpoints here")

    restore = save


class Aggregator:
    """A service and its link, as a member of :class:`Turns`."""

    def __init__(self, link: LoopbackLink, service: Service) -> None:
        self.link, self.service = link, service

    def poll(self, now: float) -> None:
        """Take what has come, and tick."""
        while (message := self.link.receive(0)) is not None:
            self.service.take(*message, now)
        self.service.tick(now)

    def due_at(self, now: float) -> float:
        """Ask the service."""
        return self.service.due_at(now)


def agent_of(number: int, server: Loopback, adapter: FirstAdapter) -> tuple[LoopbackLink, Agent]:
    """Make an agent that keeps everything in memory."""
    identity = Identity(f"device-{number:05d}", JOB, ARTIFACT)
    link = server.connect(identity.topics, will=identity.will)
    home = Home(link, MemoryOutbox(), MemoryFiles(), identity, adapter, checkpoint_every=0)
    return link, Agent(home, Workbench(Training, None, num_samples=10))


def run(count: int) -> dict[str, float]:
    """Run a job of ``ROUNDS`` rounds with all agents in each, and return its figures."""
    settings = Settings(
        job=JOB, artifact=ARTIFACT, rounds=ROUNDS, clients=count, min_clients=count, work=LocalWork(steps=1)
    )
    server, ends = Loopback(), [time.process_time()]
    turns = Turns(server)
    link = server.connect(topics(JOB), will=will(JOB, "session"))
    service = Service(
        link,
        MemoryStore(),
        settings,
        patience=Patience(),
        adapter=ADAPTER,
        session="session",
        now=turns.now,
        on_row=lambda row: ends.append(time.process_time()) if row.round else None,
    )
    turns.join(link, Aggregator(link, service))
    adapter = FirstAdapter.of(ADAPTER)
    for number in range(count):
        turns.join(*agent_of(number, server, adapter))
    turns.run(until=lambda: service.finished)
    open_files = len(os.listdir("/proc/self/fd")) - 1  # one is the listing's own
    assert len(ends) == ROUNDS + 1
    first, *rounds = (after - before for before, after in pairwise(ends))
    return {
        "round_cpu_s": statistics.median(rounds),
        "first_round_cpu_s": first,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "open_files": open_files,
    }


def main() -> None:
    """Run, and print what it took."""
    print(json.dumps(run(int(sys.argv[1]))))


if __name__ == "__main__":
    main()
