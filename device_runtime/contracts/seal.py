"""A signature at the end of a message: one more field of its map, ``signed``, which a reader that knows none skips.

Signed are the purpose, the topic (which names the job, and the device where there is one) and every byte before the signature:
docs/protocol.md has them one by one. No key and no cryptography is here.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

PURPOSE = b"fleetune v1: an aggregator's message\n"
SIGNATURE_BYTES = 64
KEY_ID_BYTES = 8

_HEAD = struct.Struct(">8sQQ")
_SIZE = _HEAD.size + SIGNATURE_BYTES
_FIELD = b"\xa6signed\xc4" + bytes([_SIZE])
"""msgpack of the text ``signed`` and of the head of so many bytes."""
SEAL_BYTES = len(_FIELD) + _SIZE
"""A sealed message is longer by this, and by at most 2 more."""


class Stamp(NamedTuple):
    """Where in the life of a job a message was said; later ones compare greater."""

    start: int
    """Of the job's aggregator, from 1; kept by its ledger."""
    number: int
    """Of the message in that start, from 0."""


class Seal(NamedTuple):
    """What stands at the end of a sealed message; nothing of it is verified."""

    key_id: bytes
    """Which key is said to have signed: the first bytes of SHA-256 of the public key."""
    stamp: Stamp
    signature: bytes
    covered: bytes
    """What the signature is to be of."""


def seal(topic: str, payload: bytes, *, key_id: bytes, stamp: Stamp, sign: Callable[[bytes], bytes]) -> bytes:
    """Return an encoded message with its seal; ``sign`` makes the 64 bytes of a signature."""
    said = _with_one_more_field(payload) + _FIELD + _HEAD.pack(key_id, *stamp)
    return said + sign(_covered(topic, said))


def parse_seal(topic: str, payload: bytes) -> Seal | None:
    """Return the seal of a message that came on ``topic``; None if it has none."""
    end = len(payload) - _SIZE
    if not payload[: max(end, 0)].endswith(_FIELD):
        return None
    key_id, start, number = _HEAD.unpack(payload[-_SIZE:-SIGNATURE_BYTES])
    covered = _covered(topic, payload[:-SIGNATURE_BYTES])
    return Seal(key_id, Stamp(start, number), payload[-SIGNATURE_BYTES:], covered)


def _covered(topic: str, said: bytes) -> bytes:
    name = topic.encode()
    return PURPOSE + len(name).to_bytes(2, "big") + name + said


def _with_one_more_field(payload: bytes) -> bytes:
    """Count one more in the head of a msgpack map of less than 65,535 fields."""
    if payload[0] == 0xDE:
        return b"\xde" + (int.from_bytes(payload[1:3], "big") + 1).to_bytes(2, "big") + payload[3:]
    count = payload[0] - 0x80 + 1
    return (bytes([0x80 + count]) if count < 16 else b"\xde\x00\x10") + payload[1:]
