"""What paho's thread reads and is woken by, without a server."""

import threading

import pytest
from paho.mqtt.client import _ConnectionState
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion

from fleetune.device_runtime.network.address import parse_url
from fleetune.device_runtime.network.paho_client import Bell, new_paho


class Pieces:
    """A socket that has so many bytes, gives as many as are asked for, and takes all that is sent."""

    def __init__(self, content: bytes) -> None:
        self.content, self.sent, self.num_calls = content, b"", 0

    def give(self, size: int) -> bytes:
        self.num_calls += 1
        if not self.content:
            raise BlockingIOError
        piece, self.content = self.content[:size], self.content[size:]
        return piece

    def recv_into(self, room: memoryview) -> int:
        piece = self.give(len(room))
        room[: len(piece)] = piece
        return len(piece)

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
    client = new_paho(parse_url("mqtt://host"), "a", is_v5=False)
    client._thread = threading.current_thread()  # as if its loop ran here
    return client


def taken(client):
    found = []
    client.on_letter = lambda _topic, payload, _is_retained: found.append(payload)
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
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    paho._sock_close()
    paho._sock = Pieces(packet(b"new", 1))
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert found == [b"whole", b"new"]


class Rings:
    def __init__(self) -> None:
        self.count = 0

    def send(self, content: bytes) -> int:
        self.count += 1
        return len(content)

    def close(self) -> None:
        pass


def test_the_bell_is_rung_once_until_the_thread_looks_and_never_by_itself():
    rings = Rings()
    bell = Bell(rings, threading.Thread(), lambda: False)
    assert [bell.send(b"0"), bell.send(b"0"), rings.count] == [1, 1, 1]
    bell.has_rung = False
    bell.send(b"0")
    assert rings.count == 2
    own = Bell(rings, threading.current_thread(), lambda: False)
    own.send(b"0")
    assert rings.count == 2


def connected(client):
    client._sock, client._state = Pieces(b""), _ConnectionState.MQTT_CS_CONNECTED
    client.is_thread_safe = True
    return client


def test_small_packets_leave_together_in_their_order_and_large_ones_alone(paho):
    pieces = []
    connected(paho)._sock.send = lambda content: pieces.append(bytes(content)) or len(content)
    for payload in (b"one", b"two", b"3" * 5000, b"four", b"five"):
        paho.publish("x", payload, qos=1)
    paho.loop_write()
    wanted = [packet(p, n) for n, p in enumerate((b"one", b"two", b"3" * 5000, b"four", b"five"), 1)]
    assert pieces == [wanted[0] + wanted[1], wanted[2], wanted[3] + wanted[4]]


def test_what_was_joined_and_sent_in_part_goes_on_where_it_stopped(paho):
    sent, room = bytearray(), [3]

    def send(content):
        if not room[0]:
            raise BlockingIOError
        taken, room[0] = content[: room[0]], 0
        sent.extend(taken)
        return len(taken)

    connected(paho)._sock.send = send
    for payload in (b"one", b"two"):
        paho.publish("x", payload, qos=1)
    paho.loop_write()
    for payload in (b"three", b"four"):
        paho.publish("x", payload, qos=1)
    for _ in range(4):
        room[0] = 1000
        paho.loop_write()
    wanted = [packet(p, n) for n, p in enumerate((b"one", b"two", b"three", b"four"), 1)]
    assert (bytes(sent), list(paho._out_packet)) == (b"".join(wanted), [])


def test_who_publishes_sends_at_once_and_does_not_ring(paho):
    rings = Rings()
    connected(paho)._sockpairW = Bell(rings, threading.Thread(), paho._send_now)
    paho.publish("x", b"one", qos=1)
    assert (paho._sock.sent, rings.count) == (packet(b"one", 1), 0)


@pytest.mark.parametrize("hindrance", ["tls", "not connected", "writing", "full", "broken"])
def test_where_something_hinders_it_the_thread_is_rung(paho, hindrance):
    rings, release, held = Rings(), threading.Event(), threading.Event()
    connected(paho)._sockpairW = Bell(rings, threading.Thread(), paho._send_now)

    def write():
        with paho._writing:
            held.set()
            release.wait(10)

    def refuse(content):
        raise BlockingIOError if hindrance == "full" else ConnectionResetError

    writer = threading.Thread(target=write)
    if hindrance == "tls":
        paho.is_thread_safe = False
    elif hindrance == "not connected":
        paho._state = _ConnectionState.MQTT_CS_CONNECTING
    elif hindrance == "writing":
        writer.start()
        held.wait(10)
    else:
        paho._sock.send = refuse
    try:
        paho.publish("x", b"one", qos=1)
    finally:
        release.set()
        if hindrance == "writing":
            writer.join()
    assert rings.count == 1
    assert [one["packet"] for one in paho._out_packet] == [packet(b"one", 1)]
    assert paho._sock is not None  # what to do about a broken connection is the thread's to say


def test_only_plain_tcp_is_written_to_from_two_threads():
    urls = ["mqtt://h", "mqtts://h", "ws://h", "wss://h"]
    clients = [new_paho(parse_url(url), "a", is_v5=True) for url in urls]
    assert [client.is_thread_safe for client in clients] == [True, False, False, False]


def test_an_acknowledgement_frees_its_message_and_is_told_once(paho):
    told = []
    paho.on_publish = lambda _client, _data, mid, code, _properties: told.append((mid, code.is_failure))
    connected(paho).publish("x", b"one", qos=1)
    paho._sock.content = b"\x40\x02\x00\x01" * 2
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert (told, dict(paho._out_messages)) == ([(1, False)], {})


def test_an_end_of_the_connection_is_noticed(paho):
    gone = []
    paho.on_disconnect = lambda *_: gone.append(True)
    connected(paho)._sock.recv_into = lambda room: 0
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_CONN_LOST
    assert (gone, paho._sock) == ([True], None)


def test_a_packet_larger_than_there_is_room_for_is_put_together_by_paho_itself(paho):
    payload = bytes(range(256)) * 1200
    size = 5 + len(payload)
    header = bytes([0x32, size % 128 | 128, size // 128 % 128 | 128, size // 128**2])
    content = packet(b"first", 1) + header + b"\x00\x01x\x00\x02" + payload + packet(b"last", 3)
    paho._sock, found = Pieces(content), taken(paho)
    while paho._sock.content or len(paho._inbox):
        assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert found == [b"first", payload, b"last"]


def test_a_length_that_has_no_end_breaks_the_connection(paho):
    paho._sock, paho.on_disconnect = Pieces(b"\x32" + b"\xff" * 5), None
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_PROTOCOL
    assert paho._sock is None


def test_an_answer_with_more_to_say_is_paho_s_to_read(paho):
    told = []
    paho.on_publish = lambda _client, _data, mid, code, _properties: told.append((mid, code.value))
    paho._protocol = MQTTProtocolVersion.MQTTv5
    connected(paho).publish("x", b"one", qos=1)
    paho._sock.content = b"\x40\x04\x00\x01\x87\x00" + b"\xd0\x00"
    assert paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert told == [(1, 0x87)]


def test_what_comes_over_a_websocket_is_read_in_the_short_way_too():
    client = new_paho(parse_url("ws://host"), "a", is_v5=False)
    client._thread = threading.current_thread()
    content, letters = packet(b"one", 1) + packet(b"two", 2), []
    client.on_letter = lambda _topic, payload, _is_retained: letters.append(payload)
    client._sock = Pieces(content)
    client._sock.recv = client._sock.give
    while client._sock.content:
        assert client.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS
    assert (letters, client._sock.sent) == ([b"one", b"two"], b"\x40\x02\0\x01\x40\x02\0\x02")
