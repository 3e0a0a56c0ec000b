"""Packets read and written without the client library's objects: the same as it reads and writes, or left to it."""

from random import Random

import mutations
import pytest
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from fleetune.device_runtime.network import packets

VERSIONS = {True: MQTTProtocolVersion.MQTTv5, False: MQTTProtocolVersion.MQTTv311}


class Sent:
    """Paho's client with a socket that takes nothing: what it would send is in its queue."""

    def __init__(self, *, is_v5):
        self.client = paho.Client(CallbackAPIVersion.VERSION2, protocol=VERSIONS[is_v5])
        self.client._sock, self.client._thread = object(), object()

    def publication(self, topic, payload, number, **more):
        self.client._out_packet.clear()
        self.client._send_publish(number, topic, payload, 1, **more)
        return bytes(self.client._out_packet[0]["packet"])


def whole(content):
    begin, end = packets.body_of(content)
    assert end == len(content)
    return packets.Packet(content[0], content[begin:end], end)


@pytest.mark.parametrize("is_v5", [True, False])
@pytest.mark.parametrize("size", [0, 1, 110, 120, 130, 16_300, 16_400, 120_000, 2_100_000])
def test_what_is_written_is_what_paho_writes_and_is_read_again(is_v5, size):
    payload, sent = bytes(range(256)) * (size // 256) + bytes(size % 256), Sent(is_v5=is_v5)
    for number, retain in ((1, False), (65_535, True)):
        theirs = sent.publication("j/Zürich/up".encode(), payload, number, retain=retain)
        flags = 2 | retain
        ours = packets.publication("j/Zürich/up".encode(), payload, number, flags=flags, is_v5=is_v5)
        assert ours == theirs
        letter = packets.letter_of(whole(ours), is_v5=is_v5)
        assert letter == ("j/Zürich/up", payload, number.to_bytes(2, "big"), retain)
        assert packets.acknowledgement(letter) == b"\x40\x02" + number.to_bytes(2, "big")


def test_a_message_with_properties_of_another_quality_or_without_a_topic_is_left_to_paho():
    sent, properties = Sent(is_v5=True), Properties(PacketTypes.PUBLISH)
    properties.UserProperty = ("a", "b")
    content = sent.publication(b"t", b"x", 1, properties=properties)
    assert packets.letter_of(whole(content), is_v5=True) is None
    plain = packets.publication(b"t", b"x", 1, flags=2, is_v5=True)
    for flags in (0, 4, 6):
        assert packets.letter_of(whole(plain)._replace(command=0x30 | flags), is_v5=True) is None
    for topic in (b"", b"\xff"):
        content = packets.publication(topic, b"x", 1, flags=2, is_v5=True)
        assert packets.letter_of(whole(content), is_v5=True) is None


def test_only_an_acknowledgement_that_says_nothing_more_is_read():
    def number(command, body):
        return packets.acknowledged(packets.Packet(command, body, 2 + len(body)))

    assert number(0x40, b"\x01\x02") == 258
    assert [number(0x40, body) for body in (b"", b"\1", b"\0\1\x10", b"\0\1\0\0")] == [None] * 4
    assert number(0x50, b"\x01\x02") is None


@pytest.mark.parametrize("size", [0, 127, 128, 20_000])
def test_a_packet_is_whole_or_none(size):
    content = packets.publication(b"t", bytes(size), 1, flags=2, is_v5=True)
    ends = [packets.body_of(content[:cut]) for cut in (*range(8), len(content) - 1)]
    assert ends == [None] * len(ends)
    assert packets.body_of(content + b"\x40\x02\0\1") == packets.body_of(content)
    with pytest.raises(ValueError, match="more than four bytes"):
        packets.body_of(b"\x32" + b"\xff" * 5)


class Flow:
    """Bytes that come as there is room, at most so many at once."""

    def __init__(self, content, step):
        self.content, self.step = content, step

    def receive(self, room):
        piece, self.content = (
            self.content[: min(self.step, len(room))],
            self.content[min(self.step, len(room)) :],
        )
        room[: len(piece)] = piece
        return len(piece)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_an_inbox_gives_each_packet_once_however_they_come(step):
    payloads = [bytes([n]) * size for n, size in enumerate((0, 3, 40, 55, 1, 60, 2))]
    content = b"".join(packets.publication(b"t", p, 1, flags=2, is_v5=True) for p in payloads)
    flow, inbox, found = Flow(content, step), packets.Inbox(70), []
    while inbox.fill(flow.receive):
        while packet := inbox.packet():
            found.append(packets.letter_of(packet, is_v5=True).payload)
            inbox.drop(packet)
    assert (found, len(inbox)) == (payloads, 0)


def test_what_is_taken_of_an_inbox_is_what_came_in_its_order():
    inbox = packets.Inbox(8)
    flow = Flow(b"abcdefghijk", 100)
    assert (inbox.fill(flow.receive), inbox.is_full, inbox.take(3), inbox.take(0)) == (8, True, b"abc", b"")
    assert (inbox.fill(flow.receive), inbox.take(100), len(inbox)) == (3, b"defghijk", 0)
    inbox.fill(Flow(b"xy", 2).receive)
    inbox.clear()
    assert (len(inbox), inbox.packet()) == (0, None)


def test_what_is_read_of_damaged_packets_is_what_paho_reads_of_them():
    decode = pytest.importorskip("paho.mqtt._packet").decode_publish
    rng, num_read = Random(0), 0
    samples = [packets.publication(b"j/a/up", b"payload" * n, n + 1, flags=2, is_v5=True) for n in range(9)]
    for _ in range(3000):
        content = mutations.of_bytes(rng.choice(samples), rng)
        try:
            found = packets.body_of(content)
        except ValueError:
            continue
        if found is None or content[0] & 0xF0 != 0x30:
            continue
        body = content[slice(*found)]
        if letter := packets.letter_of(packets.Packet(content[0], memoryview(body), found[1]), is_v5=True):
            theirs = decode(content[0], body, MQTTProtocolVersion.MQTTv5)
            number = int.from_bytes(letter.packet_id, "big")
            assert (letter.topic.encode(), letter.payload, number) == (
                theirs.topic,
                theirs.payload,
                theirs.mid,
            )
            assert (letter.is_retained, theirs.qos) == (theirs.retain, 1)
            num_read += 1
    assert num_read > 100
