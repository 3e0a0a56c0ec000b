"""Mosquitto with WebSockets, an aggregator, a device in Python and one in Node: the adapter of two Python devices."""

import time

import pytest
from node_web import needs_web
from processes import Processes
from web_federation import JOB, TIMEOUT_S, NodeDevice, federation, furthest, websocket_server
from words import write_lines

from fleetune.device_runtime.contracts.wire import decode, device_topic
from fleetune.device_runtime.network.link import Link

pytestmark = [needs_web, pytest.mark.slow]


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"codec": "int8"},
        {"codec": "quant", "codec_bits": 4, "policy": "bernoulli", "drop": 0.5},
        {"codec": "topk", "codec_ratio": 0.3, "down_codec": "xor"},
        {"codec": "innovation"},
        {"codec": "innovation", "codec_bits": 8, "lazy": 1000.0},
    ],
    ids=["fp32", "int8", "quant", "topk and xor", "innovation", "innovation, lazy"],
)
def test_a_page_device_gives_what_a_python_device_gives(job, word_artifact, tmp_path):
    expected, _ = federation(tmp_path / "python", word_artifact, job, node=None)
    found, device = federation(tmp_path / "node", word_artifact, job, node={})
    # Coded steps may fall on the other side of a border, where two runtimes round otherwise.
    limit = 1e-6 if not job else 2e-3
    assert furthest(found, expected) < limit
    kinds = device.kinds()
    assert kinds.count("accepted") == 3
    assert "declined" not in kinds
    assert "refused" not in kinds
    ended = device.events[-1]
    assert ended["kind"] == "ended"
    assert [line["verdict"] for line in ended["left"]] == ["accepted"] * 3


def test_a_connection_that_breaks_loses_and_doubles_nothing(word_artifact, tmp_path):
    """Cut after an offer, in a run, and with an update under way."""
    expected, _ = federation(tmp_path / "python", word_artifact, {}, node=None)
    cuts = ["offer", "step", "trained", "sent"]
    found, device = federation(tmp_path / "node", word_artifact, {}, node={"cutAt": cuts})
    assert furthest(found, expected) < 1e-6
    # A cut of a connection that is cut already is none more.
    assert device.events[-1]["connections"] > 1
    assert device.kinds().count("accepted") == 3


def test_a_device_that_is_killed_goes_on(word_artifact, tmp_path):
    """SIGKILL in a run, which goes on from its checkpoint, and with an update made: nothing acknowledged is lost or doubled."""
    expected, _ = federation(tmp_path / "python", word_artifact, {}, node=None)
    pending = [("step", 4), ("trained", 1)]

    def disturb(device):
        kinds = device.kinds()
        if pending and kinds.count(pending[0][0]) >= pending[0][1]:
            pending.pop(0)
            device.kill()
            device.start()

    node = {"state": tmp_path / "b.store", "checkpointEvery": 1}
    found, device = federation(tmp_path / "node", word_artifact, {}, node=node, disturb=disturb)
    assert not pending
    assert furthest(found, expected) < 1e-6
    assert "restored" in device.kinds()
    assert [line["verdict"] for line in device.events[-1]["left"]] == ["accepted"] * 3


def test_a_hello_names_the_connection_that_it_came_over(word_artifact, tmp_path):
    """So the aggregator knows whether what was on its way is lost."""
    server, ws = websocket_server(tmp_path)
    data = write_lines(tmp_path / "b.csv")
    given = {"artifact": word_artifact, "data": data, "url": ws, "job": "words", "id": "b", "helloS": 0.2}
    device, named = NodeDevice(tmp_path, **given), []
    with server, Link(server.url, client_id="ear", topics=[device_topic("words", "b", "up")]) as ear:

        def hear(count):
            deadline = time.monotonic() + TIMEOUT_S
            while len(named) < count:
                assert time.monotonic() < deadline, device.log.read_text()
                if found := ear.receive(0.1):
                    named.append(decode(found[1]).connection)

        device.start()
        try:
            hear(3)
            server.kill()
            server.start()
            hear(6)
        finally:
            device.kill()
    assert len(set(named)) == 2
    assert len(set(named[:3])) == 1
    assert all(named)


def test_what_the_engine_cannot_is_declined(word_artifact, tmp_path):
    """A job whose work a page does not do ends for it with a reason, and not with a hang."""
    server, ws = websocket_server(tmp_path)
    processes = Processes(tmp_path, word_artifact, hello_s=2.0)
    data = write_lines(tmp_path / "b.csv")
    job = {**JOB, "rounds": 1, "clients": 1, "min_clients": 1, "personal": 1}
    with server:
        common = {"mqtt": server.url, "job": "words", "timeout_s": 120}
        processes.start("aggregator", "aggregate", common | {"out": str(tmp_path / "run"), **job})
        given = {
            "artifact": word_artifact,
            "data": data,
            "url": ws,
            "job": "words",
            "id": "b",
            "helloS": 2,
        }
        device = NodeDevice(tmp_path, **given).start()
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while "declined" not in device.kinds():
                assert time.monotonic() < deadline, device.log.read_text() + processes.log("aggregator")
                time.sleep(0.02)
        finally:
            processes.close()
            device.kill()
    text = next(event["text"] for event in device.events if event["kind"] == "declined")
    assert "1 personal layers" in text
    assert "fleetune device does it" in text


def test_a_server_without_websockets_or_with_logins_is_one_sentence(word_artifact, tmp_path, mosquitto):
    data = write_lines(tmp_path / "b.csv")
    url = mosquitto.url.replace("mqtt://", "ws://")
    given = {"artifact": word_artifact, "data": data, "job": "words", "id": "b"}
    for number, (own, said) in enumerate(
        [(url, "protocol websockets"), (mosquitto.url, "cannot speak mqtt://")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        device = NodeDevice(folder, **given, url=own, timeoutS=3).start()
        device.process.wait(60)
        last = device.events[-1]
        assert last["name"] == "TransportError"
        assert said in last["text"]
