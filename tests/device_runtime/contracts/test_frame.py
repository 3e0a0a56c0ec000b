"""Frame 2: what is in it, what it refuses, and how little memory a lie costs."""

import tracemalloc
import zlib

import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.contracts.codecs import make_codec, pack, sizes_by_kind, unpack
from fleetune.device_runtime.contracts.codecs.deflate import deflated, inflated
from fleetune.device_runtime.errors import WireError

REFERENCE = {"a": np.zeros((40, 20), np.float32), "b": np.zeros(7, np.float32)}
VALUES = {n: np.random.default_rng(1).normal(size=v.shape).astype(np.float32) for n, v in REFERENCE.items()}
QUANT = make_codec("quant", 0.0, 4)


def payload_of(codec=QUANT):
    return msgspec.msgpack.decode(pack(codec, VALUES, REFERENCE).payload)


def refused(fields, codec=QUANT):
    with pytest.raises(WireError) as caught:
        unpack(codec, msgspec.msgpack.encode(fields), REFERENCE)
    return str(caught.value)


def test_a_part_is_deflated_where_that_is_shorter_and_the_length_tells():
    noise, text = np.random.default_rng(0).bytes(100_000), b"ab" * 5000
    assert deflated(noise) is noise
    assert len(deflated(text)) < len(text) / 5
    assert inflated(deflated(text), len(text), what="x") == text
    assert deflated(b"a" * 63) == b"a" * 63


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"table": [5, b"\x90"]}, "table: does not inflate to 5 bytes"),
        ({"table": [1, b"\x90"], "parts": {}}, ""),
        ({"table": "x"}, "malformed"),
        ({"parts": {"other": [1, b"1"]}}, "no part 'other'"),
        ({"parts": {"positions": [1, b"1"]}}, "quant: no part 'positions'"),
        ({"parts": {"values": [-1, b""]}}, "malformed"),
        ({"parts": {"values": [10**9, b"x"]}}, "inflates to 1000000"),
        ({"parts": {f"values-{i}": [0, b""] for i in range(17)}}, "malformed"),
        ({"parts": {}}, "0 bytes of values and 0 of scales, expected 404 and 14"),
        ({"codec": "topk"}, "'topk'; expected quant"),
        ({"v": 1}, "malformed"),
    ],
)
def test_what_does_not_fit_is_refused(change, said):
    fields = payload_of() | change
    if said:
        assert said in refused(fields)
    else:
        assert unpack(QUANT, msgspec.msgpack.encode(fields), REFERENCE).values == {}


def test_tensors_out_of_order_or_twice_are_refused():
    for rows in ([["b", [7]], ["a", [40, 20]]], [["b", [7]], ["b", [7]]]):
        table = msgspec.msgpack.encode(rows)
        assert "comes twice, or out of order" in refused(payload_of() | {"table": [len(table), table]})


def test_a_payload_in_the_other_frame_of_its_codec_is_refused():
    old, new = make_codec("topk", 0.5), make_codec("topk", 0.5, 16)
    with pytest.raises(WireError, match="frame 1; expected 2"):
        unpack(new, pack(old, VALUES, REFERENCE).payload, REFERENCE)
    with pytest.raises(WireError, match="frame 2; expected 1"):
        unpack(old, pack(new, VALUES, REFERENCE).payload, REFERENCE)


def bomb(size):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(bytes(size)) + stream.flush()


@pytest.mark.parametrize("part", ["table", "values"])
@pytest.mark.parametrize("told", [700, 10**9])
def test_a_bomb_costs_no_memory(part, told):
    fields, section = payload_of(), [told, bomb(10**6)]
    fields |= {"table": section} if part == "table" else {"parts": fields["parts"] | {"values": section}}
    content = msgspec.msgpack.encode(fields)
    tracemalloc.start()
    try:
        with pytest.raises(WireError):
            unpack(QUANT, content, REFERENCE)
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


CODECS = [
    ("fp32", 0.0, 0),
    ("int8", 0.0, 0),
    ("topk", 0.1, 0),
    ("topk", 0.1, 8),
    ("quant", 0.0, 1),
    ("caesar", 0.5, 0),
]


@pytest.mark.parametrize(("name", "ratio", "bits"), CODECS)
def test_every_byte_is_of_one_kind(name, ratio, bits):
    payload = pack(make_codec(name, ratio, bits), VALUES, REFERENCE).payload
    sizes = sizes_by_kind(payload)
    assert list(sizes) == ["values", "positions", "scales", "protocol"]
    assert sum(sizes.values()) == len(payload)


def test_the_kinds_by_hand():
    sizes = {row: sizes_by_kind(pack(make_codec(*row), VALUES, REFERENCE).payload) for row in CODECS}
    assert sizes["fp32", 0.0, 0]["values"] == 4 * 807
    assert (sizes["int8", 0.0, 0]["values"], sizes["int8", 0.0, 0]["scales"]) == (807, 4 * 5)
    assert (sizes["topk", 0.1, 0]["values"], sizes["topk", 0.1, 0]["positions"]) == (2 * 81, 1 + 100 + 1)
    assert sizes["quant", 0.0, 1]["values"] == 101
    assert sizes["caesar", 0.5, 0]["scales"] == 8


@pytest.mark.parametrize("content", [b"", b"\xc0", b"\x81\xa1v\x02", b"\x82\xa1v\x07\xa5codec\xa1x"])
def test_what_is_no_payload_has_no_kinds(content):
    with pytest.raises(WireError):
        sizes_by_kind(content)
