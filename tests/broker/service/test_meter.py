from types import SimpleNamespace

from fleet import JOB, first_adapter, world

from fleetune.broker.service.meter import Meter
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.store.rows import rows
from fleetune.broker.store.store import AFTERWARDS, Cost
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.wire import aggregator_topic
from fleetune.device_runtime.network.loopback import Loopback


def test_bytes_are_counted_on_both_sides(tmp_path):
    done = world(tmp_path, numbers=(0, 1), down_codec="whole").run()
    found = rows(done.aggregator.ledger)
    update_bytes = len(encode_update("fp32", {n: first_adapter()[n] for n in ("w", "b")}, first_adapter()))
    adapter_bytes = len(done.aggregator.version(0))
    assert [row.bytes_up for row in found] == [0, *[2 * update_bytes] * 3], "never_trained does not travel"
    assert [row.bytes_down for row in found] == [0, 0, 2 * adapter_bytes, 2 * adapter_bytes], (
        "version 0 is at hand"
    )
    cost = done.aggregator.ledger.cost()
    assert cost.bytes_up == 6 * update_bytes
    assert cost.bytes_received > cost.bytes_up
    assert cost.bytes_sent > cost.bytes_down


def test_what_is_spent_is_booked_once_and_under_the_round_of_its_time():
    link = Loopback().connect([])
    store = MemoryStore()
    meter = Meter(link, store, bucket=0, now=10.0)
    meter.count(down=7)
    link.publish(aggregator_topic(JOB), b"four")
    meter.turn_to(1, 12.0)
    meter.count(up=3)
    meter.turn_to(1, 13.0)
    meter.spend(15.0)
    meter.turn_to(AFTERWARDS, 16.0)
    meter.spend(20.0)
    assert store.cost(0) == Cost(bytes_down=7, bytes_sent=4, seconds=2.0)
    assert store.cost(1) == Cost(bytes_up=3, seconds=4.0)
    assert store.cost(AFTERWARDS) == Cost(seconds=4.0)


def test_what_came_before_the_meter_and_is_read_after_it_counts_on_both_sides():
    link, store = SimpleNamespace(bytes_sent=0, bytes_received=44, bytes_taken=10), MemoryStore()
    meter = Meter(link, store, bucket=0, now=0.0)
    meter.received("d", 30)
    link.bytes_received += 5
    meter.close(1.0)
    assert store.cost().bytes_received == 39
    assert {one: carried.up.total for one, carried in store.carried().items()} == {"d": 30, "": 9}
