"""Deflate by zlib and by zlib-ng: the same bytes, the same verdicts, the same bounds; and without zlib-ng."""

import sys
import tracemalloc
import zlib

import numpy as np
import pytest

from fleetune.device_runtime.contracts.codecs import make_codec, pack, unpack
from fleetune.device_runtime.contracts.codecs.deflate import HUFFMAN, RUNS, TEXT, deflated, inflated, swiftest
from fleetune.device_runtime.errors import WireError

RNG = np.random.default_rng(5)
REFERENCE = {
    name: RNG.normal(0, 0.05, size).astype(np.float32) for name, size in (("a.0.x", 40_000), ("a.1.x", 700))
}
VALUES = {
    name: (value + 1e-3 * RNG.standard_t(3, value.size)).astype(np.float32)
    for name, value in REFERENCE.items()
}
CODECS = [
    ("topk", 0.1, 8),
    ("quant", 0.0, 2),
    ("quant", 0.0, 8),
    ("quant", 0.0, 16),
    ("innovation", 0.0, 0),
    ("caesar", 0.9, 16),
    ("caesar", 0.4, 32),
    ("xor", 0.0, 0),
]
CONTENTS = {
    "noise": RNG.bytes(70_000),
    "codes": (128 + 9 * RNG.standard_t(3, 100_000)).clip(0, 255).astype(np.uint8).tobytes(),
    "gaps": RNG.geometric(0.1, 50_000).clip(0, 255).astype(np.uint8).tobytes(),
    "rare": (RNG.random(90_000) < 0.01).astype(np.uint8).tobytes(),
    "zeros": bytes(200_000),
    "short": b"ab" * 32,
}


@pytest.fixture(params=["zlib", "zlib_ng"])
def library(request, monkeypatch):
    """One library in the place of whichever is installed."""
    _choose(request.param, monkeypatch)
    yield request.param
    swiftest.cache_clear()


def _choose(library, monkeypatch):
    if library == "zlib":
        monkeypatch.setitem(sys.modules, "zlib_ng", None)
    else:
        monkeypatch.delitem(sys.modules, "zlib_ng", raising=False)
        pytest.importorskip("zlib_ng")
    swiftest.cache_clear()


def by_each(made):
    """What ``made`` returns with zlib, and with zlib-ng."""
    found = []
    for library in ("zlib", "zlib_ng"):
        with pytest.MonkeyPatch.context() as patch:
            _choose(library, patch)
            found.append(made())
    swiftest.cache_clear()
    return found


def test_zlib_ng_is_taken_where_it_is_installed(library):
    assert swiftest().__name__.split(".")[0] == library


@pytest.mark.parametrize("strategy", [HUFFMAN, RUNS, TEXT])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_both_make_the_same_bytes_of_a_part(content, strategy):
    one, other = by_each(lambda: deflated(content, strategy))
    assert one == other


def test_of_zeros_with_runs_next_to_nothing_is_left():
    assert len(deflated(bytes(200_000), RUNS)) < 400 < len(deflated(bytes(200_000)))


@pytest.mark.parametrize("row", CODECS, ids=str)
def test_both_make_the_same_payload_and_the_same_values(row):
    codec = make_codec(*row)
    one, other = by_each(lambda: pack(codec, VALUES, REFERENCE).payload)
    assert one == other
    by_zlib, by_ng = by_each(lambda: unpack(codec, one, REFERENCE).values)
    conveyed = pack(codec, VALUES, REFERENCE).conveyed
    for name, value in conveyed.items():
        assert value.tobytes() == by_zlib[name].tobytes() == by_ng[name].tobytes()


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_streams_of_any_writer_are_read(library, level):
    for content in CONTENTS.values():
        stream = zlib.compressobj(level, zlib.DEFLATED, -15)
        data = stream.compress(content) + stream.flush()
        assert inflated(data, len(content), what="x") == content


@pytest.mark.parametrize("size", [99_999, 100_001, 0])
def test_a_stream_of_another_length_is_refused(library, size):
    data = deflated(CONTENTS["codes"])
    with pytest.raises(WireError, match=f"x: does not inflate to {size} bytes"):
        inflated(data, size, what="x")


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b"", lambda d: b"\7" + d]
)
def test_what_is_not_one_whole_stream_is_refused(library, damage):
    data = deflated(CONTENTS["codes"])
    with pytest.raises(WireError, match="x: "):
        inflated(damage(data), 100_000, what="x")


def test_both_say_the_same_of_damaged_streams():
    rng, content = np.random.default_rng(0), CONTENTS["gaps"][:3000]
    whole = deflated(content)
    streams = []
    for _ in range(500):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] ^= 1 << int(rng.integers(8))
        streams.append(bytes(data))
    one, other = by_each(lambda: [_read(data, len(content)) for data in streams])
    assert one == other
    assert None in one
    assert any(one), "some damage leaves a stream of the same length"


def _read(data, size):
    try:
        return inflated(data, size, what="x")
    except WireError:
        return None


def test_a_bomb_makes_no_byte_more_than_was_told(library):
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = stream.compress(bytes(30_000_000)) + stream.flush()
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="does not inflate to 1000 bytes"):
            inflated(bomb, 1000, what="x")
        assert tracemalloc.get_traced_memory()[1] < len(bomb) + 200_000
    finally:
        tracemalloc.stop()
