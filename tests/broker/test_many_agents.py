"""Many agents in one process, all of them in memory."""

import gc
import os

import pytest
from fleet import FOUR, Aggregator, Device, World, first_adapter, in_process, settings_of
from steps import calls_of

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.network.loopback import Loopback

SIZE = 30


def world_in_memory(folder, count, **changes):
    server = Loopback()
    fields = {"clients": count, "min_clients": count, "size": SIZE, "in_memory": True, **changes}
    aggregator = Aggregator(server, folder, **fields).start()
    adapter = FirstAdapter.of(first_adapter(SIZE))
    devices = [Device(server, None, n, size=SIZE, adapter=adapter).start() for n in range(count)]
    return World(server, aggregator, devices)


@pytest.mark.parametrize("turns", [0, 5, 12])
def test_in_memory_gives_what_one_process_gives_kills_or_not(tmp_path, turns):
    running = world_in_memory(tmp_path, len(FOUR))
    for _ in range(turns):
        running.turn()
    for device in running.devices[:2]:
        device.kill()
        device.start()
    running.run()
    assert running.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of(), size=SIZE)


def test_agents_in_memory_open_no_file(tmp_path):
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    gc.collect()  # what earlier tests have left closes now, not meanwhile
    before = num_open()
    running = world_in_memory(tmp_path, 20).run()
    assert num_open() <= before
    assert len(running.aggregator.rows) == 4


def calls_of_a_round(folder, count):
    """Functions called in the second round: an amount of work that no other load on the machine changes."""
    running = world_in_memory(folder, count, rounds=2)
    running.run(until=lambda: running.aggregator.service.federation.version == 1)
    return calls_of(running.run)


def test_a_round_costs_little_more_an_agent_when_there_are_many(tmp_path):
    few, many = (calls_of_a_round(tmp_path / str(count), count) / count for count in (10, 160))
    assert many < 1.25 * few
