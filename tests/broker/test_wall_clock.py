"""A wall clock that jumps by hours, either way, before and during rounds: the same bits in the same time, no round lost."""

import ast
import itertools
from datetime import datetime, timezone

import fleet
import pytest
from paths import ROOT

from fleetune.device_runtime.terms.terms import Terms

HOUR = 3600.0
NOON = datetime(2026, 11, 27, 12, tzinfo=timezone.utc).timestamp()
ASKED = {
    "broker/authority/certificates.py": "from when to when a certificate holds",
    "broker/store/ledger.py": "written beside a start and the end of a job, and read by nobody",
    "device_runtime/commands/doctor.py": "whether the clock is set, and certificates",
    "device_runtime/contracts/secure_sums/vouching.py": "whether a certificate holds",
    "device_runtime/network/tls.py": "whether a certificate ends soon",
    "device_runtime/rules/sensors.py": "the owner's hours",
    "device_runtime/terms/contract.py": "when something left; a day over a boot",
}
"""Where the wall clock is asked, and for what. Deadlines, patience, periods and tallies are not among it."""
WALL = {
    ("time", "time"),
    ("datetime", "now"),
    ("datetime", "utcnow"),
    ("datetime", "today"),
    ("date", "today"),
}


def asks_the_wall_clock(path):
    attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    return any((getattr(node.value, "id", ""), node.attr) in WALL for node in attributes)


def test_the_wall_clock_is_asked_only_where_it_must_be():
    paths = [p for room in ("device_runtime", "broker") for p in (ROOT / room).rglob("*.py")]
    assert {str(p.relative_to(ROOT)) for p in paths if asks_the_wall_clock(p)} == set(ASKED)


def jumping(jumps):
    """A clock that stands at a time after another of its list every time it is asked."""
    at = itertools.cycle(jumps)
    return lambda: NOON + next(at)


def run(folder, monkeypatch, jumps, terms=Terms(least_samples=0, least_effective=0, least_batch=0)):
    folder.mkdir()
    wall = jumping(jumps)
    monkeypatch.setattr("fleetune.broker.store.ledger.time.time", wall)
    server = fleet.Loopback()
    aggregator = fleet.Aggregator(server, folder, clients=2, min_clients=2, size=60).start()
    devices = [
        fleet.Device(
            server, folder, n, size=60, terms=terms, clocks={"clock": lambda: 0.0, "wall": wall}
        ).start()
        for n in (0, 1)
    ]
    world = fleet.World(server, aggregator, devices)
    world.die_together(3, 5, 7)
    world.run()
    return [aggregator.version(n) for n in range(4)], world


@pytest.mark.parametrize(
    "jumps", [(5 * HOUR,), (-5 * HOUR,), (0.0, 9 * HOUR, -9 * HOUR, 23 * HOUR), (-56 * 365 * 24 * HOUR, 0.0)]
)
def test_a_clock_that_jumps_changes_no_bit_and_no_round(tmp_path, monkeypatch, jumps):
    calm, quiet_world = run(tmp_path / "calm", monkeypatch, (0.0,))
    found, world = run(tmp_path / "jumps", monkeypatch, jumps)
    assert found == calm
    assert world.now == quiet_world.now
    assert [row.round for row in world.aggregator.rows] == [row.round for row in quiet_world.aggregator.rows]
