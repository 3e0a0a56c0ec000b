"""Messages: exact bytes, what a newer sender may add, and a decoder that refuses everything else with one error."""

from typing import get_origin

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.contracts import fields, mask_messages, wire, work
from fleetune.device_runtime.draws import SEED_MAX
from fleetune.device_runtime.errors import ConfigError, WireError
from fleetune.device_runtime.options import fields_of, problems

TRANSFER = wire.TransferManifest(size_bytes=3, chunk_bytes=2, chunk_digests=bytes(16), sha256="f" * 64)
MASKED, KEY = {"job": "j", "task_id": "t", "round": 1}, bytes(range(32))
PEER = mask_messages.MaskPeer(place=0, device_id="e", mask_key=KEY, share_key=KEY)
SHARE = mask_messages.MaskShare(place=0, data=b"share")
MESSAGES = [
    wire.Hello(device_id="d", artifact="a" * 64, role="evaluate", num_samples=7, version=3),
    wire.Offer(
        job="j", round=1, version=0, role="train", work=work.LocalWork(), adapter=TRANSFER, deadline_s=9.5
    ),
    wire.UpdateReady(
        device_id="d",
        job="j",
        round=1,
        version=0,
        codec="int8",
        num_samples=7,
        payload=TRANSFER,
        stats={"loss": 0.5},
    ),
    wire.Report(device_id="d", job="j", round=1, version=1, loss=0.25, accuracy=1.0, num_samples=7),
    wire.Decline(device_id="d", job="j", round=1, reason="no codec 'zip'"),
    wire.Verdict(job="j", round=1, digest="f" * 64, accepted=False, reason="round 1 is closed"),
    wire.Request(sha256="f" * 64, missing=b"\x07", limit=4),
    wire.Chunk(sha256="f" * 64, index=1, data=b"abc"),
    wire.Finished(job="j", reason="done"),
    wire.DeviceStatus(device_id="d", online=False),
    wire.DeviceStatus(device_id="d", online=True, paused="temperature 80.0 C is above 70 C"),
    wire.AggregatorStatus(job="j", session="s", online=True, round=2, version=1),
    wire.Look(rounds_from=2),
    wire.View(
        job="j",
        session="s",
        round=2,
        num_rounds=3,
        version=1,
        is_open=True,
        figures=[wire.RoundFigures(round=1, devices=2, measured={"loss": 0.5})],
    ),
    mask_messages.MaskKeys(**MASKED, device_id="d", mask_key=KEY, share_key=KEY, seed_digest=KEY),
    mask_messages.MaskGroup(**MASKED, group="1-0", place=2, mask_key=KEY, threshold=2, peers=[PEER]),
    mask_messages.MaskShares(**MASKED, device_id="d", group="1-0", shares=[SHARE]),
    mask_messages.MaskInbox(**MASKED, group="1-0", shares=[SHARE]),
    mask_messages.MaskAsk(**MASKED, group="1-0", delivered=[0, 2], dropped=[1]),
    mask_messages.MaskReveal(**MASKED, device_id="d", group="1-0", seeds=[SHARE], secrets=[]),
]
each_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)


def test_every_kind_of_message_is_tried():
    assert {type(message) for message in MESSAGES} == set(wire.Message.__args__)


@each_message
def test_what_is_encoded_is_decoded(message):
    content = wire.encode(message)
    assert wire.decode(content) == wire.decode(memoryview(content)) == message


@each_message
def test_fields_of_a_newer_sender_are_skipped(message):
    fields = msgspec.msgpack.decode(wire.encode(message)) | {"new": {"deep": [1, b"x"]}}
    assert wire.decode(msgspec.msgpack.encode(fields)) == message


def test_an_offer_from_before_there_were_periods_is_read():
    offer = MESSAGES[1]
    fields = msgspec.msgpack.decode(wire.encode(offer))
    del fields["work"]["rounds_before"], fields["work"]["policy"]["period"]
    assert wire.decode(msgspec.msgpack.encode(fields)) == offer


@each_message
def test_another_protocol_version_is_refused(message):
    with pytest.raises(WireError, match="protocol version 2; this side speaks 1"):
        wire.decode(wire.encode(msgspec.structs.replace(message, v=2)))


def test_the_exact_bytes_of_a_chunk():
    content = wire.encode(wire.Chunk(sha256="ab", index=1, data=b"\x00\xff"))
    assert content == b"\x85\xa4type\xa5chunk\xa1v\x01\xa6sha256\xa2ab\xa5index\x01\xa4data\xc4\x02\x00\xff"


def test_the_largest_chunk_fits_into_a_message():
    content = wire.encode(wire.Chunk(sha256="f" * 64, index=2**31, data=bytes(fields.CHUNK_BYTES)))
    assert len(content) < fields.MESSAGE_BYTES_MAX
    assert len(content) + len(wire.device_topic("j" * 64, "d" * 64, "down")) + 16 <= 128_000  # AWS IoT Core


def test_an_oversized_message_is_refused_before_it_is_read():
    with pytest.raises(WireError, match="131073 bytes; at most 131072"):
        wire.decode(b"\xc1" * (fields.MESSAGE_BYTES_MAX + 1))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xc1", b"\x80", b"\x81\xa4type\xa4none", b"\x91" * 10_000, b"\xdd\xff\xff\xff\xff",
     b"\x81\xa4type\xa5\xff\xfe\xfd\xfc\xfb",
     msgspec.msgpack.encode({"type": "chunk", "v": 1, "sha256": "f", "index": "one", "data": b""})],
)  # fmt: skip
def test_what_is_no_message_is_refused(content):
    with pytest.raises(WireError, match="malformed message"):
        wire.decode(content)


@settings(max_examples=300, deadline=None)
@given(
    message=st.sampled_from(MESSAGES),
    edits=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=4),
    cut=st.integers(0, 300),
)
def test_any_mutation_is_a_message_or_refused(message, edits, cut):
    content = bytearray(wire.encode(message))
    for place, byte in edits:
        content[place % len(content)] = byte
    try:
        assert isinstance(wire.decode(content[:cut]), wire.Message)
    except WireError as exc:
        assert str(exc).isprintable()  # noqa: PT017 (either outcome is right)


def test_a_stranger_writes_no_line_into_our_log():
    content = msgspec.msgpack.encode({"type": "x\nERROR all is lost \x1b[31m" + "y" * 9999, "v": 1})
    with pytest.raises(WireError) as caught:
        wire.decode(content)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def _fields(kind, path=()):
    """Every field of a message, and of the structs inside it, as (path, bare type)."""
    for field in fields_of(kind):
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            yield from _fields(field.type, (*path, field.name))
        elif field.name != "v":
            yield (*path, field.name), get_origin(field.type) or field.type


def _with(message, path, value):
    """The bytes of a message with another value at a path, as a stranger would write them."""
    fields = msgspec.msgpack.decode(wire.encode(message))
    *way, last = path
    at = fields
    for name in way:
        at = at[name]
    at[last] = value
    return msgspec.msgpack.encode(fields)


EVERY_FIELD = [
    (message, *found)
    for message in {type(m): m for m in MESSAGES}.values()
    for found in _fields(type(message))
]
of_type = {
    kind: [(m, path) for m, path, found in EVERY_FIELD if found is kind] for kind in (int, str, bytes, dict)
}


def _named(value):
    return ".".join(value) if isinstance(value, tuple) else type(value).__name__


@pytest.mark.parametrize(("message", "path"), of_type[int], ids=_named)
def test_every_number_has_bounds(message, path):
    """Sums of many have to stay within an int64, wherever they are made."""
    for value in (2**63 - 1, 2**63, 2**64 - 1, 2**33, -2, -(2**63)):
        if path in (("work", "seed"), ("work", "rows_seed")) and 0 <= value <= SEED_MAX:
            continue
        if "work" in path:  # a device declines it with a reason
            work = wire.decode(_with(message, path, value)).work
            assert problems(work), path
            continue
        with pytest.raises(WireError, match="malformed message: Expected `int`"):
            wire.decode(_with(message, path, value))


@pytest.mark.parametrize(("message", "path"), of_type[str], ids=_named)
def test_no_text_is_endless_or_moves_a_cursor(message, path):
    for value in ("x" * 10_000, "a\nWARNING all is lost", "\x1b[2J", "a\u202eb", "\x00", "\u2028"):
        try:
            found = wire.decode(_with(message, path, value))
        except WireError as exc:
            assert str(exc).isprintable()  # noqa: PT017 (either outcome is right)
            continue
        for name in path:
            found = getattr(found, name)
        assert path[-1] in ("reason", "paused", "said")
        assert found.isprintable()
        assert len(found) <= fields.REASON_CHARS_MAX


@pytest.mark.parametrize(("message", "path"), of_type[bytes], ids=_named)
def test_every_field_of_bytes_has_a_bound(message, path):
    with pytest.raises(WireError, match="malformed message: Expected `bytes` of length <="):
        wire.decode(_with(message, path, bytes(fields.CHUNK_BYTES + 1)))


@pytest.mark.parametrize("stats", [{f"s{i}": 1.0 for i in range(33)}, {"x" * 65: 1.0}, {"a\n": 1.0}])
def test_an_update_has_few_statistics_with_short_names(stats):
    with pytest.raises(WireError, match="malformed message"):
        wire.decode(_with(MESSAGES[2], ("stats",), stats))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e12])
def test_a_deadline_is_a_time(value):
    with pytest.raises(WireError, match="malformed message: Expected `float`"):
        wire.decode(_with(MESSAGES[1], ("deadline_s",), value))


@pytest.mark.parametrize("name", ["a", "device-1", "A.b_c-d", "0" * 64])
def test_names_that_may_stand_in_a_topic(name):
    assert fields.check_name("device id", name) == name


@pytest.mark.parametrize("name", ["", "a/b", "+", "#", "a b", "é", "-a", ".a", "0" * 65, "a\n", "$SYS"])
def test_names_that_may_not(name):
    with pytest.raises(ConfigError, match=r"device id .*: use 1 to 64 letters"):
        fields.check_name("device id", name)


def test_topics():
    assert wire.device_topic("job", "+", "up") == "fleetune/v1/job/device/+/up"
    assert wire.aggregator_topic("job") == "fleetune/v1/job/aggregator/status"


def test_the_largest_group_and_the_largest_shares_fit_into_a_message():
    peers = [
        mask_messages.MaskPeer(place=2**31 - 1, device_id="d" * 64, mask_key=KEY, share_key=KEY)
        for _ in range(fields.NEIGHBOURS_MAX)
    ]
    group = mask_messages.MaskGroup(**MASKED, group="g" * 64, place=0, mask_key=KEY, threshold=2, peers=peers)
    shares = [
        mask_messages.MaskShare(place=2**31 - 1, data=bytes(82)) for _ in range(fields.NEIGHBOURS_MAX + 1)
    ]
    inbox = mask_messages.MaskInbox(**MASKED, group="g" * 64, shares=shares)
    for message in (group, inbox):
        assert len(wire.encode(message)) < fields.MESSAGE_BYTES_MAX
        assert wire.decode(wire.encode(message)) == message


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_mask_key_of_another_length_is_refused(length):
    fields = msgspec.msgpack.decode(
        wire.encode(
            mask_messages.MaskKeys(**MASKED, device_id="d", mask_key=KEY, share_key=KEY, seed_digest=KEY)
        )
    )
    with pytest.raises(WireError, match="malformed"):
        wire.decode(msgspec.msgpack.encode(fields | {"mask_key": bytes(length)}))
