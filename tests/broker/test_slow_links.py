"""Rounds over slow links under the pretended clock: nothing is sent twice."""

import pytest
from slow import shared_world, slow_world

from fleetune.broker.jobs.patience import Patience

SIZE = 80_000
"""Float32 values: an adapter as large as MiniLM's, 320 kB."""
COUNT, ROUNDS = 3, 2
MOST = 1.02
"""Bytes carried per byte wanted: an adapter file has a header, an update another."""


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize("bytes_s", [2.5e3, 10e3, 50e3, 1e8])
def test_a_slow_link_carries_everything_once(tmp_path, bytes_s, latency_s, size):
    running = slow_world(
        tmp_path,
        COUNT,
        bytes_s=bytes_s,
        latency_s=latency_s,
        size=size,
        rounds=ROUNDS,
        patience=Patience(deadline_s=0),
    ).run()
    cost = running.aggregator.ledger.cost()
    assert cost.bytes_down <= MOST * COUNT * 4 * size * (ROUNDS - 1), "version 0 is not fetched"
    assert cost.bytes_up <= MOST * COUNT * 4 * size * ROUNDS


@pytest.mark.parametrize("bytes_s", [5e3, 10e3, 50e3])
def test_a_narrow_line_that_all_share_carries_everything_once(tmp_path, bytes_s):
    """Announcements and hellos wait behind chunks there, and come long after what they ask for is on its way."""
    patience = Patience(deadline_s=0, evaluation_s=3600)
    running = shared_world(tmp_path, COUNT, bytes_s=bytes_s, rounds=ROUNDS, patience=patience).run(turns=9000)
    whole = 4 * SIZE
    assert running.aggregator.ledger.cost().bytes_up <= MOST * COUNT * whole * ROUNDS
    came = sum(device.timed.bytes_received for device in running.devices)
    assert came <= 1.03 * whole * (COUNT * (ROUNDS - 1) + ROUNDS), "with all small messages"


def time_of(folder, count, *, num_updates, bytes_s=2000.0, before=lambda running: None, **changes):
    """Pretended seconds until so many updates of 12 kB have come."""
    settings = {"size": 3000, "rounds": 1, "patience": Patience(deadline_s=0), **changes}
    running = slow_world(folder, count, bytes_s=bytes_s, **settings)
    before(running)
    running.run(until=lambda: len(running.aggregator.ledger.past().accepted) >= num_updates)
    return running.now


def test_fifty_slow_uploads_overlap(tmp_path):
    alone = time_of(tmp_path / "one", 1, num_updates=1)
    assert time_of(tmp_path / "fifty", 50, num_updates=50) < 1.2 * alone


def test_devices_that_die_while_they_upload_free_their_places_at_once(tmp_path):
    def kill_eight(running):
        running.run(until=lambda: running.now > 2.0)
        for device in running.devices[:8]:
            device.kill()

    alone = time_of(tmp_path / "one", 1, num_updates=1)
    eight = Patience(deadline_s=0, uploads_mb=0.1)
    found = time_of(tmp_path / "many", 20, num_updates=12, min_clients=12, patience=eight, before=kill_eight)
    assert found < 3 * alone, "twelve, eight at a time, after eight that died on their way"


def test_a_device_that_dies_in_its_upload_goes_on_when_it_is_back(tmp_path):
    running = slow_world(tmp_path, 1, bytes_s=10e3, rounds=1, patience=Patience(deadline_s=0))
    running.run(until=lambda: running.now > 25.0)
    running.devices[0].kill()
    running.devices[0].start()
    running.run()
    assert running.aggregator.ledger.cost().bytes_up <= MOST * 4 * SIZE, "two chunks had come"
