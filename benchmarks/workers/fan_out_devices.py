"""Devices of ``benchmarks/fan_out.py``: real agents and links in one process, each with a step that takes no time.

Usage: fan_out_devices.py URL MB FIRST STOP STEP. Says ``ready`` once all are connected, and runs until it is ended.
"""

import sys
import time

from fan_out import ARTIFACT, JOB, adapter_of
from many_agents import Training

from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.link import Link, Will

IDLE_S = 0.01


def main(url: str, size_mb: str, *numbers: str) -> None:
    """Connect, and work for ever."""
    adapter = FirstAdapter.of(adapter_of(float(size_mb)))
    agents = [agent_of(url, number, adapter) for number in range(*map(int, numbers))]
    print("ready", flush=True)
    while True:
        have_more = [agent.poll(time.monotonic()) for agent in agents]
        if not any(have_more):
            time.sleep(IDLE_S)


def agent_of(url: str, number: int, adapter: FirstAdapter) -> Agent:
    """Make a device and open its link."""
    identity = Identity(f"device-{number:05d}", JOB, ARTIFACT)
    link = Link(url, client_id=identity.device_id, topics=identity.topics, will=Will(*identity.will))
    link.open()
    home = Home(link, MemoryOutbox(), MemoryFiles(), identity, adapter, checkpoint_every=0)
    return Agent(home, Workbench(Training, None, num_samples=10))


if __name__ == "__main__":
    main(*sys.argv[1:])
