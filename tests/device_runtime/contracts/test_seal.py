"""The seal of a message: its exact bytes, and that none but what was signed has them."""

import random
from contextlib import suppress

import golden_wire
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from golden_wire import MESSAGES, filled

from fleetune.device_runtime.contracts import wire
from fleetune.device_runtime.contracts.seal import SEAL_BYTES, parse_seal
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.network.signing import Signer, Trusted

KEY = Ed25519PrivateKey.from_private_bytes(bytes([1]) * 32)
TRUSTED = Trusted([KEY.public_key()])
DOWN = wire.device_topic("job", "device-1", "down")


def sealed(message, *, topic=DOWN, start=3):
    return Signer(KEY, start=start).seal(topic, wire.encode(message))


def is_good(topic, payload):
    seal = parse_seal(topic, payload)
    return seal is not None and TRUSTED.verify(seal)


def test_the_exact_bytes_of_a_seal():
    """docs/protocol.md says them in words."""
    payload = sealed(wire.Finished(job="job", reason="done"))
    plain = wire.encode(wire.Finished(job="job", reason="done"))
    key_id = "34750f98bd59fcfc"
    head = b"\xa6signed\xc4\x58" + bytes.fromhex(key_id) + (3).to_bytes(8, "big") + (0).to_bytes(8, "big")
    said = bytes([plain[0] + 1]) + plain[1:] + head
    name = b"fleetune/v1/job/device/device-1/down"
    covered = b"fleetune v1: an aggregator's message\n" + b"\x00\x24" + name + said
    assert payload == said + KEY.sign(covered)
    assert (len(payload) - len(plain), SEAL_BYTES) == (97, 97)


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_sealed_message_is_read_also_by_who_knows_no_seal(kind):
    message = filled(kind)
    payload = sealed(message)
    assert is_good(DOWN, payload)
    assert wire.decode(payload) == message
    fields = msgspec.msgpack.decode(payload)
    assert fields.keys() - msgspec.msgpack.decode(wire.encode(message)).keys() == {"signed"}
    assert parse_seal(DOWN, wire.encode(message)) is None


@pytest.mark.parametrize("count", [1, 14, 15, 16, 300])
def test_a_map_of_any_length_gets_one_more_field(count):
    fields = {f"field {i}": i for i in range(count)}
    payload = Signer(KEY, start=1).seal(DOWN, msgspec.msgpack.encode(fields))
    found = msgspec.msgpack.decode(payload)
    assert len(found.pop("signed")) == 88
    assert found == fields


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_every_changed_bit_breaks_it(kind):
    payload = sealed(filled(kind))
    for place in range(0, 8 * len(payload), 1 if len(payload) < 200 else 7):
        changed = bytearray(payload)
        changed[place // 8] ^= 1 << place % 8
        assert not is_good(DOWN, bytes(changed)), place


@pytest.mark.parametrize(
    "topic",
    [
        wire.device_topic("job", "device-2", "down"),
        wire.device_topic("other", "device-1", "down"),
        wire.device_topic("job", "device-1", "up"),
        wire.aggregator_topic("job"),
        "",
    ],
)
def test_it_holds_for_one_topic_alone(topic):
    assert not is_good(topic, sealed(wire.Finished(job="job")))


def test_a_seal_cut_short_or_taken_from_another_message_is_none():
    one, other = sealed(wire.Finished(job="job")), sealed(wire.Finished(job="job", reason="x"))
    assert not any(is_good(DOWN, one[:length]) for length in range(len(one)))
    assert not any(is_good(DOWN, one[start:]) for start in range(1, len(one)))
    assert not is_good(DOWN, one[:-64] + other[-64:])
    assert not is_good(DOWN, one + one[-SEAL_BYTES:])
    assert not is_good(DOWN, one[:-64] + bytes(64))
    assert not is_good(DOWN, one[:-64] + b"\xff" * 64)


def mutated(rng, payload):
    """A frame with one to four bytes changed, cut out, put in, or repeated; or a piece of another length."""
    changed = bytearray(payload)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[place] ^= rng.randint(1, 255)
            case 1:
                del changed[place : place + rng.randint(1, 80)]
            case 2:
                changed[place:place] = rng.randbytes(rng.randint(1, 80))
            case 3:
                changed += changed[place : place + 100]
        changed = changed or bytearray(b"\x80")
    return bytes(changed)


@pytest.mark.parametrize("count", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_no_mutated_frame_is_good_and_none_escapes(count):
    rng = random.Random(11)
    frames = [sealed(filled(kind), start=rng.randint(0, 2**40)) for kind in MESSAGES]
    frames += [bytes.fromhex(line["bytes"]) for line in golden_wire.dialogue()]
    for _ in range(count):
        frame = rng.choice(frames)
        changed = mutated(rng, frame)
        assert changed == frame or not is_good(DOWN, changed)
        with suppress(WireError):
            wire.decode(changed)
