"""Rounds over slow links under the pretended clock: nothing is sent twice."""

import pytest
from slow import slow_world

from fleetune.broker.job import Patience

SIZE = 80_000
"""Float32 values: an adapter as large as MiniLM's, 320 kB."""
COUNT, ROUNDS = 3, 2
MOST = 1.02
"""Bytes carried per byte wanted: an adapter file has a header, an update another."""


@pytest.mark.parametrize("size", [SIZE, 4 * SIZE])
@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize("bytes_s", [2.5e3, 10e3, 50e3])
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
