"""The two MQTT packets that nearly all are, read without an object for each of their fields; all others are the client library's.

Source: MQTT 5.0, sections 2.1 (fixed header), 3.3 (PUBLISH) and 3.4 (PUBACK); MQTT 3.1.1 has the same without properties.
"""

from collections.abc import Callable
from typing import NamedTuple

PUBLISH, PUBACK = 0x30, 0x40
_KIND, _QOS, _QOS_1, _RETAIN = 0xF0, 0x06, 0x02, 0x01
_LENGTH_BYTES_MAX = 4

Octets = bytes | bytearray | memoryview


class Packet(NamedTuple):
    """A packet that is whole."""

    command: int
    """Its first byte."""
    body: Octets
    """What follows its length."""
    size_bytes: int
    """Of all of it."""


class Letter(NamedTuple):
    """A message of QoS 1 without properties."""

    topic: str
    payload: bytes
    packet_id: bytes
    """Two bytes, as its acknowledgement repeats them."""
    is_retained: bool


class Inbox:
    """What has come of a connection and is not read. Packets are not copied: they are read before more is filled in."""

    def __init__(self, room_bytes: int) -> None:
        """Begin empty, for ``room_bytes`` at most."""
        self._room = memoryview(bytearray(room_bytes))
        self._begin = self._end = 0

    def __len__(self) -> int:
        return self._end - self._begin

    @property
    def is_full(self) -> bool:
        """Whether nothing more has room."""
        return len(self) == len(self._room)

    def fill(self, receive: Callable[[memoryview], int]) -> int:
        """Have ``receive`` write where there is room, which there must be; it says, and this does, how many bytes those are."""
        if self._begin:
            left = len(self)
            self._room[:left] = self._room[self._begin : self._end]
            self._begin, self._end = 0, left
        count = receive(self._room[self._end :])
        self._end += count
        return count

    def packet(self) -> Packet | None:
        """The first packet; None if not all of it is there. ValueError if its length is malformed."""
        content = self._room[self._begin : self._end]
        found = body_of(content)
        return Packet(content[0], content[slice(*found)], found[1]) if found else None

    def drop(self, packet: Packet) -> None:
        """Forget the first packet."""
        self._begin += packet.size_bytes

    def take(self, size_bytes: int) -> bytes:
        """Give and forget the first bytes, at most so many."""
        end = min(self._end, self._begin + size_bytes)
        taken = bytes(self._room[self._begin : end])
        self._begin = end
        return taken

    def clear(self) -> None:
        """Forget all."""
        self._begin = self._end = 0


def body_of(content: Octets) -> tuple[int, int] | None:
    """Where the body of the first packet begins and ends; None if not all is there. ValueError if its length is malformed."""
    length = 0
    for index in range(1, min(1 + _LENGTH_BYTES_MAX, len(content))):
        length |= (content[index] & 0x7F) << 7 * (index - 1)
        if content[index] < 0x80:
            end = index + 1 + length
            return (index + 1, end) if end <= len(content) else None
    if len(content) > _LENGTH_BYTES_MAX:
        raise ValueError("a length of more than four bytes")
    return None


def letter_of(packet: Packet, *, is_v5: bool) -> Letter | None:
    """Read a PUBLISH; None if it is none, has properties, no topic or another QoS, or is malformed.

    Args:
        packet: what came.
        is_v5: whether the connection speaks MQTT 5, in which the length of the properties is there.
    """
    command, body, _ = packet
    end = 2 + int.from_bytes(body[:2], "big")
    begin = end + (3 if is_v5 else 2)
    if (
        command & (_KIND | _QOS) != PUBLISH | _QOS_1
        or end == 2
        or len(body) < begin
        or (is_v5 and body[begin - 1])
    ):
        return None
    try:
        topic = str(body[2:end], "utf-8")
    except UnicodeDecodeError:
        return None
    return Letter(topic, bytes(body[begin:]), bytes(body[end : end + 2]), bool(command & _RETAIN))


def publication(topic: bytes, payload: Octets, number: int, *, flags: int, is_v5: bool) -> bytes:
    """Write a PUBLISH of QoS 1 without properties.

    Args:
        topic: at most 65,535 bytes of UTF-8.
        payload: of the message.
        number: 1 to 65,535, which its acknowledgement repeats.
        flags: the lower four bits of the first byte.
        is_v5: as :func:`letter_of`.
    """
    head = len(topic).to_bytes(2, "big") + topic + number.to_bytes(2, "big") + (b"\0" if is_v5 else b"")
    length, left = bytearray(), len(head) + len(payload)
    while left >= 0x80:
        length.append(left & 0x7F | 0x80)
        left >>= 7
    length.append(left)
    return b"".join((bytes((PUBLISH | flags,)), length, head, payload))


def acknowledged(packet: Packet) -> int | None:
    """Number of the message that a PUBACK says the server has; None if it is none, or says anything besides."""
    return int.from_bytes(packet.body, "big") if packet.command == PUBACK and len(packet.body) == 2 else None


def acknowledgement(letter: Letter) -> bytes:
    """The PUBACK of a message, whole."""
    return bytes((PUBACK, 2)) + letter.packet_id
