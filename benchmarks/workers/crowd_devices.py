"""Devices of ``benchmarks/crowd.py``: real agents and links in one process, each with a step that takes no time.

Usage: crowd_devices.py URL MB FIRST STOP STEP. Says ``ready`` once all are connected, and runs until it is ended. An agent
that has no message and nothing due is not polled, so that many cost little.
"""

import contextlib
import heapq
import queue
import sys
import time
from math import inf

import numpy as np
from crowd import ARTIFACT, JOB, adapter_of
from many_agents import Training

from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.link import Link, Will
from fleetune.device_runtime.network.mailbox import Mailbox

_STEP = 1e-6


class Nudge(Training):
    """One step, which moves the adapter by a number that is the device's own: what is left out shows in the sum."""

    def __init__(self, work, adapter, number):
        super().__init__(work, adapter)
        self._number = number

    def step(self):
        """Do it."""
        before = self.adapter
        at = super().step()
        self.adapter = {
            name: value + np.float32(_STEP * (1 + self._number)) for name, value in before.items()
        }
        return at


class Bell(Mailbox):
    """A mailbox that tells one queue for all whenever something has come."""

    def __init__(self, number: int, rung: "queue.SimpleQueue[int]") -> None:
        super().__init__(16_384)
        self._number, self._rung = number, rung

    def put(self, topic: str, payload: bytes) -> bool:
        """Take a message in, and ring."""
        is_taken = super().put(topic, payload)
        self._rung.put(self._number)
        return is_taken

    def wake(self) -> None:
        """Ring."""
        super().wake()
        self._rung.put(self._number)


class Crowd:
    """The agents of this process, of whom those have turns that have a message or are due."""

    def __init__(self, url: str, numbers: range, adapter: FirstAdapter) -> None:
        self._rung: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._agents = [self._agent(url, index, number, adapter) for index, number in enumerate(numbers)]
        self._due = [-inf] * len(self._agents)
        self._heap = [(-inf, index) for index in range(len(self._agents))]

    def turn(self) -> None:
        """Wait until somebody has something to do, and poll all who have."""
        wait_s = self._heap[0][0] - time.monotonic() if self._heap else 1.0
        ready = set()
        if wait_s > 0:
            with contextlib.suppress(queue.Empty):
                ready.add(self._rung.get(timeout=min(wait_s, 1.0)))
        while not self._rung.empty():
            ready.add(self._rung.get())
        now = time.monotonic()
        while self._heap and self._heap[0][0] <= now:
            due, index = heapq.heappop(self._heap)
            if self._due[index] == due:
                ready.add(index)
        for index in ready:
            self._poll(index)

    def _poll(self, index: int) -> None:
        agent = self._agents[index]
        has_more = agent.poll(time.monotonic())
        now = time.monotonic()
        due = now if has_more else agent.due_at(now)
        if due != self._due[index] or due <= now:
            self._due[index] = due
            if due < inf:
                heapq.heappush(self._heap, (due, index))

    def _agent(self, url: str, index: int, number: int, adapter: FirstAdapter) -> Agent:
        """Make a device and open its link."""
        identity = Identity(f"device-{number:05d}", JOB, ARTIFACT)
        link = Link(url, client_id=identity.device_id, topics=identity.topics, will=Will(*identity.will))
        link._received = Bell(index, self._rung)
        link.open(120)
        home = Home(link, MemoryOutbox(), MemoryFiles(), identity, adapter, checkpoint_every=0)
        bench = Workbench(lambda work, adapter: Nudge(work, adapter, number), None, num_samples=10)
        return Agent(home, bench)


def main(url: str, size_mb: str, *numbers: str) -> None:
    """Connect, and work for ever."""
    crowd = Crowd(url, range(*map(int, numbers)), FirstAdapter.of(adapter_of(float(size_mb))))
    print("ready", flush=True)
    while True:
        crowd.turn()


if __name__ == "__main__":
    main(*sys.argv[1:])
