import pytest

from fleetune.device_runtime.agent import deliveries
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Hello, UpdateReady
from fleetune.device_runtime.network.loopback import LoopbackLink


def test_a_payload_is_hashed_once_on_its_way(stage, monkeypatch):
    hashed = []

    def spy(content, **how):
        hashed.append(len(content))
        return Outgoing(content, **how)

    monkeypatch.setattr(deliveries, "Outgoing", spy)
    update = stage.trained()
    assert stage.pull(update)
    assert hashed == [update.payload.size_bytes]


def test_an_update_is_announced_until_there_is_a_verdict(stage):
    update = stage.trained()
    stage.now += 6
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update]
    stage.aggregator.verdict(update)
    stage.poll()
    assert stage.device.kinds()[-1] == "accepted"
    stage.now += 1000
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    assert stage.device.outbox.pending() == []


def test_announcements_become_rarer(stage):
    stage.trained()
    stage.aggregator.heard()
    for _ in range(300):
        stage.now += 1
        stage.aggregator.status("one")
        stage.poll()
    assert 5 < len(stage.aggregator.heard(UpdateReady)) < 20


def test_who_pulls_needs_no_announcement(stage):
    update = stage.trained()
    stage.pull(update)
    stage.now += 14
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    stage.now += 2
    stage.poll(2)
    assert len(stage.aggregator.heard(UpdateReady)) == 1, "the verdict may have got lost"


def test_an_update_survives_the_device(stage):
    update = stage.trained()
    stage.device.kill()
    stage.device.start()
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update]


def test_chunks_become_smaller_when_the_server_takes_less(stage):
    update = stage.trained()
    stage.device.link.chunk_bytes = 1000
    stage.now += 10
    stage.poll()
    (smaller,) = stage.aggregator.heard(UpdateReady)
    assert smaller.payload.sha256 == update.payload.sha256
    assert smaller.payload.chunk_bytes == 1000
    assert stage.pull(smaller)


def test_while_disconnected_it_trains_on_and_announces_later(stage):
    stage.aggregator.offer()
    stage.poll(2)
    stage.device.link.connected = False
    stage.until("trained")
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    stage.device.link.connected = True
    stage.server.restart()
    stage.poll(2)
    assert len(stage.aggregator.heard(UpdateReady)) == 1


@pytest.mark.parametrize("column", ["header", "payload"])
@pytest.mark.parametrize("junk", [b"\xa5\xff\xff\xff\xff\xff", b"", b"\xc1"])
def test_a_damaged_delivery_is_dropped_and_its_work_done_again(stage, caplog, column, junk):
    update = stage.trained()
    stage.device.outbox._database.execute(f"UPDATE deliveries SET {column} = ?", (junk,))
    stage.device.kill()
    stage.device.start()
    assert "what train-1-device-3 gave is dropped" in caplog.text
    assert stage.device.outbox.pending() == []
    again = stage.trained()
    assert again.payload.sha256 == update.payload.sha256


class Slowed(LoopbackLink):
    """A link whose server has acknowledged no message that was sent since ``held``."""

    held = None

    @property
    def messages_acknowledged(self):
        return self.messages_sent if self.held is None else self.held


def hold(stage):
    """Nothing more is acknowledged."""
    link = stage.device.link
    link.__class__, link.held = Slowed, link.messages_sent


def test_what_is_still_on_its_way_is_not_said_again(stage):
    update = stage.trained()
    hold(stage)
    stage.now += 6
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update], "the first one was acknowledged"
    for _ in range(20):
        stage.now += 60
        stage.poll()
    assert stage.aggregator.heard(UpdateReady) == []
    assert stage.aggregator.heard(Hello)[1:] == []
    stage.device.link.held = None
    stage.now += 60
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update], "it may have got lost"


def test_nor_is_an_update_announced_behind_its_own_chunks(stage):
    update = stage.trained()
    hold(stage)
    stage.pull(update)
    for _ in range(20):
        stage.now += 60
        stage.poll()
    assert stage.aggregator.heard(UpdateReady) == []
