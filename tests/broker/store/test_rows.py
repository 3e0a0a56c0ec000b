from rounds_by_hand import report

from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.rows import rows
from fleetune.broker.store.store import Cost


def store():
    found = MemoryStore()
    for version in range(2):
        found.add_version(version, b"x", round_number=version)
    return found


def test_waiting_for_devices_is_no_round():
    found = store()
    found.spend(0, Cost(seconds=111.2))
    found.spend(1, Cost(seconds=20.0))
    assert [(row.seconds, row.waited_s) for row in rows(found)] == [(0.0, 111.2), (20.0, 0.0)]


def test_a_mean_is_that_of_all_samples_however_many_a_device_claims():
    found = store()
    found.report(report("a", 1, loss=1.0, accuracy=0.5, num_samples=2**63 - 1))
    found.report(report("b", 1, loss=3.0, accuracy=1.0, num_samples=2**63 - 1))
    assert (rows(found)[1].loss, rows(found)[1].accuracy) == (2.0, 0.75)
