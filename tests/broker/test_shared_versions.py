"""Versions that are published once for all who fetch them at the same time, under the pretended clock."""

import pytest
from fleet import JOB, roughly
from signed import KEY, trusting
from slow import OpenLink, TimedLink, slow_world

from fleetune.broker.jobs.patience import Patience
from fleetune.device_runtime.contracts.wire import Chunk, Finished, decode, encode, shared_topic

SIZE = 80_000
"""Float32 values: 320 kB, three chunks, one part."""
LARGE = 20 * SIZE
"""6.4 MB, 53 chunks, five parts."""
COUNT, FAST = 4, 1e8
MOST = 1.02
"""Bytes carried per byte wanted: an adapter file has a header."""


def shared_world(folder, *, bytes_s=FAST, link=OpenLink, size=SIZE, share=True, **changes):
    """Two rounds of four devices: version 0 is at hand, version 1 is fetched whole."""
    changes = {"rounds": 2, "patience": Patience(deadline_s=0, share=share), **changes}
    return slow_world(folder, COUNT, bytes_s=bytes_s, link=link, size=size, **changes)


def copies(running, size=SIZE):
    """How often the aggregator sent an adapter."""
    return running.aggregator.ledger.cost().bytes_down / (4 * size)


def versions(running):
    return [running.aggregator.version(number) for number in (1, 2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return shared_world(tmp_path_factory.mktemp("alone"), share=False).run()


def test_devices_that_fetch_together_are_sent_one_copy_and_learn_the_same(tmp_path, alone):
    together = shared_world(tmp_path).run()
    assert COUNT <= copies(alone) <= MOST * COUNT
    assert 1 <= copies(together) <= MOST
    assert versions(together) == versions(alone)
    assert all(not device.link.extra for device in together.devices), "nobody listens on"


def test_an_adapter_of_many_parts_is_sent_once(tmp_path):
    assert 1 <= copies(shared_world(tmp_path, size=LARGE).run(), LARGE) <= MOST


def test_a_device_that_cannot_listen_is_sent_its_own(tmp_path, alone):
    mixed = shared_world(tmp_path, link=[TimedLink, OpenLink, OpenLink, OpenLink]).run()
    assert 2 <= copies(mixed) <= 2 * MOST
    assert versions(mixed) == versions(alone)


def test_a_slow_device_leaves_after_the_first_part_and_holds_nobody_up(tmp_path):
    def fetched_at(running):
        """When the quick ones have version 1, and so have begun with it."""
        quick = running.devices[1:]
        running.run(until=lambda: all(d.slow_agent._assignments.version == 1 for d in quick))
        return running.now

    def first_version_at(running):
        running.run(until=lambda: running.aggregator.service.federation.version == 1)
        return running.now

    running = shared_world(tmp_path, bytes_s=[10e3, FAST, FAST, FAST], up_bytes_s=FAST, size=LARGE)
    began = first_version_at(running)
    took = fetched_at(running) - began
    assert took < 2.0, "no more than a moment's wait for who does not ask on"
    received = running.devices[0].timed.bytes_received
    running.run()
    own = running.devices[0].timed.bytes_received - received
    assert own <= MOST * 4 * LARGE, "it was sent no chunk twice, and none that it had not asked for"
    assert copies(running, LARGE) <= 2 * MOST


def test_where_the_server_keeps_the_stream_from_devices_they_fetch_alone(tmp_path, alone):
    """As Mosquitto does, in silence, where its access list is of an earlier release."""

    def deny(topic, payload):
        return () if "/shared/" in topic else (payload,)

    denied = shared_world(tmp_path, disturb=deny, rounds=3).run()
    assert versions(denied) == versions(alone)
    assert copies(denied) <= MOST * (1 + 2 * COUNT), "one in vain, and no second one"


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_network_does_to_chunks_all_is_learned(tmp_path, alone, seed):
    assert versions(shared_world(tmp_path, disturb=roughly(seed)).run()) == versions(alone)


def test_after_a_restart_of_the_server_devices_share_what_is_left(tmp_path):
    running = shared_world(tmp_path, size=LARGE, bytes_s=2e6)
    agents = [device.slow_agent._assignments for device in running.devices]
    running.run(until=lambda: all(a.is_fetching and a._current.pull.share > 0.3 for a in agents))
    running.server.restart()
    running.run()
    assert copies(running, LARGE) < 2, "what was on its way is sent again, and no more"


def test_who_trusts_a_key_takes_chunks_of_a_stream_and_nothing_else_there(tmp_path, alone):
    running = shared_world(tmp_path, key=KEY, trusted=trusting(), in_memory=False)
    forged = encode(Finished(job=JOB, is_error=True))

    def lie(topic, payload):
        return (forged, payload) if "/shared/" in topic else (payload,)

    running.server.disturb = lie
    running.run()
    assert versions(running) == versions(alone)
    assert copies(running) <= MOST


def test_a_stream_is_never_retained(tmp_path):
    running, said = shared_world(tmp_path), []
    publish = running.server.publish

    def listen(topic, payload, *, retain):
        said.append((topic, payload, retain))
        publish(topic, payload, retain=retain)

    running.server.publish = listen
    running.run()
    shared = [(decode(payload), retain) for topic, payload, retain in said if "/shared/" in topic]
    assert shared
    assert all(isinstance(message, Chunk) and not retain for message, retain in shared)
    assert {topic for topic, *_ in said if "/shared/" in topic} == {shared_topic(JOB, "session-1-2", 0)}, (
        "stream 1 was version 0"
    )


def test_what_is_shared_has_a_row_of_its_own_and_all_rows_are_what_was_sent(tmp_path):
    running = shared_world(tmp_path).run()
    ledger = running.aggregator.ledger
    running.aggregator.service.stop(running.now)
    carried = ledger.carried()
    assert 4 * SIZE <= carried["(shared)"].down.values <= MOST * 4 * SIZE
    assert all(one.down.values < SIZE for name, one in carried.items() if name.startswith("device-"))
    assert carried["(shared)"].up.total == carried[""].down.values == 0
    assert sum(one.down.total for one in carried.values()) == ledger.cost().bytes_sent
