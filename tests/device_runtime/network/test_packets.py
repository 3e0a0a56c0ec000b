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


def parts(content):
    begin, end = packets.body_of(content)
    assert end == len(content)
    return content[0], content[begin:end]


@pytest.mark.parametrize("is_v5", [True, False])
@pytest.mark.parametrize("size", [0, 1, 110, 120, 130, 16_300, 16_400, 120_000, 2_100_000])
def test_what_is_written_is_what_paho_writes_and_is_read_again(is_v5, size):
    payload, sent = bytes(range(256)) * (size // 256) + bytes(size % 256), Sent(is_v5=is_v5)
    for number, retain in ((1, False), (65_535, True)):
        theirs = sent.publication("j/Zürich/up".encode(), payload, number, retain=retain)
        flags = 2 | retain
        ours = packets.publication("j/Zürich/up".encode(), payload, number, flags=flags, is_v5=is_v5)
        assert ours == theirs
        letter = packets.letter_of(*parts(ours), is_v5=is_v5)
        assert letter == ("j/Zürich/up", payload, number.to_bytes(2, "big"), retain)
        assert packets.acknowledgement(letter) == b"\x40\x02" + number.to_bytes(2, "big")


def test_a_message_with_properties_of_another_quality_or_without_a_topic_is_left_to_paho():
    sent, properties = Sent(is_v5=True), Properties(PacketTypes.PUBLISH)
    properties.UserProperty = ("a", "b")
    content = sent.publication(b"t", b"x", 1, properties=properties)
    assert packets.letter_of(*parts(content), is_v5=True) is None
    plain = packets.publication(b"t", b"x", 1, flags=2, is_v5=True)
    for flags in (0, 4, 6):
        assert packets.letter_of(0x30 | flags, parts(plain)[1], is_v5=True) is None
    for topic in (b"", b"\xff"):
        content = packets.publication(topic, b"x", 1, flags=2, is_v5=True)
        assert packets.letter_of(*parts(content), is_v5=True) is None


def test_only_an_acknowledgement_that_says_nothing_more_is_read():
    assert packets.acknowledged(0x40, b"\x01\x02") == 258
    assert [packets.acknowledged(0x40, body) for body in (b"", b"\1", b"\0\1\x10", b"\0\1\0\0")] == [None] * 4
    assert packets.acknowledged(0x50, b"\x01\x02") is None


@pytest.mark.parametrize("size", [0, 127, 128, 20_000])
def test_a_packet_is_whole_or_none(size):
    content = packets.publication(b"t", bytes(size), 1, flags=2, is_v5=True)
    ends = [packets.body_of(content[:cut]) for cut in (*range(8), len(content) - 1)]
    assert ends == [None] * len(ends)
    assert packets.body_of(content + b"\x40\x02\0\1") == packets.body_of(content)
    assert packets.body_of(b"\x32" + b"\xff" * 5) is None  # no length has five bytes


def test_what_is_read_of_damaged_packets_is_what_paho_reads_of_them():
    decode = pytest.importorskip("paho.mqtt._packet").decode_publish
    rng, num_read = Random(0), 0
    samples = [packets.publication(b"j/a/up", b"payload" * n, n + 1, flags=2, is_v5=True) for n in range(9)]
    for _ in range(3000):
        content = mutations.of_bytes(rng.choice(samples), rng)
        if (found := packets.body_of(content)) is None or content[0] & 0xF0 != 0x30:
            continue
        body = content[slice(*found)]
        if letter := packets.letter_of(content[0], memoryview(body), is_v5=True):
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
