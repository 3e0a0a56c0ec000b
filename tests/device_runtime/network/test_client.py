"""What paho's thread reads and is woken by, without a server."""

import threading

import pytest
from paho.mqtt.enums import MQTTErrorCode

from fleetune.device_runtime.network import client as client_module
from fleetune.device_runtime.network.address import parse_url


class Pieces:
    """A socket that has so many bytes, gives as many as are asked for, and takes all that is sent."""

    def __init__(self, content: bytes) -> None:
        self.content, self.sent, self.num_calls = content, b"", 0

    def recv(self, size: int) -> bytes:
        self.num_calls += 1
        if not self.content:
            raise BlockingIOError
        piece, self.content = self.content[:size], self.content[size:]
        return piece

    def send(self, content: bytes) -> int:
        self.sent += content
        return len(content)

    def close(self) -> None:
        pass


def packet(payload: bytes, mid: int) -> bytes:
    """PUBLISH of MQTT 3.1.1 on topic x, QoS 1."""
    body = b"\x00\x01x" + mid.to_bytes(2, "big") + payload
    size = len(body)
    return b"\x32" + (bytes([size]) if size < 128 else bytes([size % 128 | 128, size // 128])) + body


@pytest.fixture
def paho():
    client = client_module._new_paho(parse_url("mqtt://host"), "a", is_v5=False)
    client._thread = threading.current_thread()  # as if its loop ran here
    return client


def taken(client):
    found = []
    client.on_message = lambda _client, _data, message: found.append(message.payload)
    return found


def test_all_packets_that_were_read_ahead_are_taken_and_acknowledged_in_one_turn(paho):
    payloads = [b"one", b"2" * 1000, b"three"]
    paho._sock, found = Pieces(b"".join(packet(p, n) for n, p in enumerate(payloads, 1))), taken(paho)
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert found == payloads
    assert paho._sock.sent == b"".join(bytes([0x40, 2, 0, n]) for n in (1, 2, 3))
    assert paho._sock.num_calls == 1


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_packet_that_is_cut_anywhere_is_taken_once_the_rest_is_there(paho, cut):
    content = packet(b"first", 1) + packet(b"second", 2) + packet(b"third", 3)
    paho._sock, found = Pieces(content[:cut]), taken(paho)
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    paho._sock.content = content[cut:]
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert found == [b"first", b"second", b"third"]


def test_what_was_read_ahead_of_a_connection_that_ended_is_not_taken_for_the_next_ones(paho):
    paho._sock, found = Pieces(packet(b"whole", 1) + packet(b"x" * 50, 2)[:20]), taken(paho)
    paho._ahead = memoryview(b"left")
    paho._sock_close()
    paho._sock = Pieces(packet(b"new", 1))
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert found == [b"new"]


class Rings:
    def __init__(self) -> None:
        self.count = 0

    def send(self, content: bytes) -> int:
        self.count += 1
        return len(content)


def test_the_bell_is_rung_once_until_the_thread_looks_and_never_by_itself():
    rings = Rings()
    bell = client_module._Bell(rings, threading.Thread())
    assert [bell.send(b"0"), bell.send(b"0"), rings.count] == [1, 1, 1]
    bell.has_rung = False
    bell.send(b"0")
    assert rings.count == 2
    own = client_module._Bell(rings, threading.current_thread())
    own.send(b"0")
    assert rings.count == 2
