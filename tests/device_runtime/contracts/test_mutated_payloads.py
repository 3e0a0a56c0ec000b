"""Payloads with anything changed in them: right shapes, finite numbers and little memory, or a WireError, whatever happened."""

import tracemalloc

import msgspec
import numpy as np
import pytest
from codec_rows import CODEC_ROWS

from fleetune.device_runtime.contracts.codecs import CODECS, make_codec, pack, unpack, update_bytes_max
from fleetune.device_runtime.errors import WireError

REFERENCE = {
    "m.layer.0.a": np.linspace(-1, 1, 600, dtype=np.float32).reshape(20, 30),
    "m.layer.1.b": np.zeros((), np.float32),
    "z": np.zeros((0, 3), np.float32),
}
_MEMORY_BYTES = 150_000
"""What msgpack, zlib's window and its first buffer take, beside some copies of the largest payload."""
_COPIES = 16
_MEASURED = 4
"""Of so many the memory of one is measured, which takes as long as five."""
_SPICE = (
    b"\xff\xff\xff\xff",
    b"\x00\x00\xc0\x7f",
    b"\x80\x7f",
    b"\xcb\x7f\xf0\x00",
    b"\xdd\xff",
    b"\xc6\x7f\xff\xff\xff",
    b"",
)


def original(codec):
    rng = np.random.default_rng(0)
    values = {n: (v + rng.standard_t(3, v.shape) * 0.1).astype(np.float32) for n, v in REFERENCE.items()}
    return pack(codec, values, REFERENCE).payload


def mutated(payload, rng):
    """Bytes changed, cut out, doubled or put in, anywhere in the payload or within one of its parts."""
    if rng.random() < 0.5:
        return _spoiled(payload, rng)
    fields = msgspec.msgpack.decode(payload)
    tensors = fields.get("tensors") or [{"data": b""}]
    if "parts" not in fields:
        tensor = tensors[rng.integers(len(tensors))]
        tensor["data"] = _spoiled(tensor["data"], rng)
        return msgspec.msgpack.encode(fields)
    name = [*fields["parts"], "table"][rng.integers(len(fields["parts"]) + 1)]
    size, data = fields["parts"].get(name, fields["table"])
    data = _spoiled(data, rng)
    section = [len(data) if rng.random() < 0.7 else int(size), data]
    fields |= {"table": section} if name == "table" else {"parts": fields["parts"] | {name: section}}
    return msgspec.msgpack.encode(fields)


def _spoiled(data, rng):
    content = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(content) + 1))
        match int(rng.integers(4)):
            case 0:
                content[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                del content[at : at + int(rng.integers(1, 9))]
            case 2:
                content[at:at] = content[at : at + int(rng.integers(1, 9))]
            case _:
                content[at : at + 4] = _SPICE[rng.integers(len(_SPICE))]
    return bytes(content)


def unpacked(codec, content):
    """What is unpacked, None if it is refused."""
    try:
        return unpack(codec, content, REFERENCE).values
    except WireError:
        return None


def peak_of(codec, content):
    """The most memory that unpacking takes, in bytes."""
    tracemalloc.start()
    try:
        unpacked(codec, content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def check(case, count):
    """Unpack ``count`` mutated payloads; return how many were not refused, and the most memory that one took."""
    codec, rng = make_codec(*case), np.random.default_rng(7)
    payload, decoded, peak = original(codec), 0, 0
    for i in range(count):
        content = mutated(payload, rng)
        if not i % _MEASURED:
            peak = max(peak, peak_of(codec, content))
        if (values := unpacked(codec, content)) is None:
            continue
        decoded += 1
        for name, value in values.items():
            assert value.shape == REFERENCE[name].shape
            assert np.isfinite(value).all()
    assert decoded, "no mutation got through the frame: the decoder was not tried"
    assert peak <= _MEMORY_BYTES + _COPIES * update_bytes_max(codec, REFERENCE)
    return decoded, peak


def test_every_codec_is_tried_and_what_it_deflates_too():
    assert {name for name, *_ in CODEC_ROWS} == CODECS.keys()
    deflated = set()
    for row in CODEC_ROWS:
        fields = msgspec.msgpack.decode(original(make_codec(*row)))
        deflated |= {name for name, (size, data) in fields.get("parts", {}).items() if len(data) < size}
    assert deflated == {"values", "values-high", "values-3", "positions"}


@pytest.mark.parametrize("case", CODEC_ROWS, ids=str)
def test_some_mutations_do_no_harm(case):
    check(case, 400)


@pytest.mark.slow
@pytest.mark.parametrize("case", CODEC_ROWS, ids=str)
def test_a_hundred_thousand_mutations_do_no_harm(case):
    print("{}: {} not refused, at most {} bytes".format(case, *check(case, 100_000)), flush=True)
