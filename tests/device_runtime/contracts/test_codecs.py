"""Laws that every codec obeys, exact bytes and sizes, and decoders that survive anything."""

from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.codecs import (
    CODECS,
    decode_update,
    encode_update,
    encode_with_feedback,
    update_bytes_max,
)
from fleetune.device_runtime.errors import UnknownName, WireError

# Largest error for a difference of magnitude 1: the one test line of a codec.
BOUNDS: dict[str, float] = {"fp32": 0.0, "fp16": 2.0**-11, "int8": 0.5 / 127 * 1.001}
SIZES: dict[str, Callable[[int], int]] = {
    "fp32": lambda n: 4 * n,
    "fp16": lambda n: 2 * n,
    "int8": lambda n: n + 4 * ((n + 255) // 256),
}
SHAPES = [(), (0,), (1,), (3, 0, 2), (255,), (256,), (257,), (7, 100)]
each_codec = pytest.mark.parametrize("codec", sorted(CODECS))


def tensors(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    draw = {str(s): rng.uniform(-0.5, 0.5, s).astype(np.float32) for s in shapes}
    return draw, {name: np.asarray(rng.uniform(-0.5, 0.5, v.shape), np.float32) for name, v in draw.items()}


@each_codec
def test_a_round_trip_keeps_shapes_and_stays_within_the_bound(codec):
    values, reference = tensors(0)
    decoded = decode_update(encode_update(codec, values, reference), reference, codec=codec)
    assert decoded.keys() == values.keys()
    for name, value in decoded.items():
        assert value.dtype == np.float64
        assert value.shape == values[name].shape
        assert np.abs(value - values[name]).max(initial=0) <= BOUNDS[codec]


@each_codec
@pytest.mark.parametrize("shape", SHAPES)
def test_the_size_formula_is_exact(codec, shape):
    value, count = np.ones(shape, np.float32), int(np.prod(shape))
    assert (
        len(CODECS[codec].encode(value, value * 0)) == CODECS[codec].size_bytes(count) == SIZES[codec](count)
    )


@each_codec
def test_no_update_exceeds_its_announced_maximum(codec):
    values, reference = tensors(1, [*SHAPES, (200, 300)])
    size = len(encode_update(codec, values, reference))
    assert size <= update_bytes_max(codec, reference) <= size + 200 * len(values)


@each_codec
def test_an_unchanged_tensor_comes_back_to_the_bit(codec):
    values, _ = tensors(2)
    for name, value in decode_update(encode_update(codec, values, values), values).items():
        np.testing.assert_array_equal(value, values[name])


@each_codec
def test_equal_values_give_equal_bytes_whatever_their_order(codec):
    values, reference = tensors(3)
    backwards = dict(reversed(values.items()))
    assert encode_update(codec, values, reference) == encode_update(codec, backwards, reference)


@each_codec
def test_a_subset_of_the_tensors_may_be_sent(codec):
    values, reference = tensors(4)
    assert decode_update(encode_update(codec, {"(1,)": values["(1,)"]}, reference), reference).keys() == {
        "(1,)"
    }
    assert decode_update(encode_update(codec, {}, reference), reference) == {}


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_on_encode(codec, bad):
    good, reference = np.zeros(3, np.float32), {"w": np.zeros(3, np.float32)}
    with pytest.raises(WireError, match="w: not finite"):
        encode_update(codec, {"w": np.where([1, 0, 0], np.float32(bad), good)}, reference)


@each_codec
def test_what_is_not_finite_is_refused_on_decode(codec):
    reference = {"w": np.zeros(3, np.float32)}
    update = msgspec.msgpack.decode(encode_update(codec, reference, reference))
    nan = np.float16 if codec == "fp16" else np.float32
    head = np.array([np.nan], nan).tobytes()
    update["tensors"][0]["data"] = head + update["tensors"][0]["data"][len(head) :]
    with pytest.raises(WireError):
        decode_update(msgspec.msgpack.encode(update), reference)


@each_codec
def test_feedback_conserves_what_was_to_be_sent(codec):
    rng = np.random.default_rng(5)
    reference = {"w": rng.normal(size=300).astype(np.float32)}
    residual: dict = {}
    wanted, conveyed = np.zeros(300), np.zeros(300)
    for _ in range(5):
        values = {"w": (reference["w"] + rng.normal(0, 0.01, 300)).astype(np.float32)}
        payload, residual = encode_with_feedback(codec, values, reference, residual)
        wanted += np.float64(values["w"]) - reference["w"]
        conveyed += decode_update(payload, reference)["w"] - reference["w"]
    np.testing.assert_allclose(conveyed + residual.get("w", 0), wanted, rtol=0, atol=1e-14)


def test_fp32_is_lossless_to_the_bit_and_leaves_no_residual():
    value = np.array([0.0, -0.0, 1e-45, 3.4e38, -1.1754942e-38, 1 / 3], np.float32)
    reference = {"w": np.full(6, 1e20, np.float32)}
    payload, residual = encode_with_feedback("fp32", {"w": value}, reference, {})
    assert decode_update(payload, reference)["w"].astype(np.float32).tobytes() == value.tobytes()
    assert residual == {}


def test_int8_by_hand():
    value, reference = np.array([1.27, -0.635, 0.004], np.float32), np.zeros(3, np.float32)
    payload = CODECS["int8"].encode(value, reference)
    assert np.frombuffer(payload[:4], "<f4")[0] == pytest.approx(0.01)
    assert list(payload[4:]) == [127, 256 - 63, 0]  # -63.5 steps, a hair less for the scale rounded up


@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1e-30, 3e38])
def test_int8_scales_hold_at_the_ends_of_the_range(peak):
    value, reference = np.array([peak, -peak], np.float32), np.zeros(2, np.float32)
    decoded = CODECS["int8"].decode(CODECS["int8"].encode(value, reference), reference)
    assert np.abs(decoded - value).max() <= max(peak, 1e-45) * (0.5 if peak > 1e-42 else 1)


def test_the_exact_bytes_of_an_update():
    update = encode_update("fp32", {"w": np.float32([1.0])}, {"w": np.float32([0.0])})
    expected = {
        "v": 1,
        "codec": "fp32",
        "tensors": [{"name": "w", "shape": [1], "data": b"\x00\x00\x80\x3f"}],
    }
    assert update == msgspec.msgpack.encode(expected)


def test_a_residual_of_a_tensor_not_sent_is_kept():
    reference = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    _, residual = encode_with_feedback(
        "fp16", {"a": np.float32([0, 0])}, reference, {"b": np.float64([1, 2])}
    )
    assert residual["b"].tolist() == [1, 2]


def test_fp16_refuses_what_it_cannot_hold():
    with pytest.raises(WireError, match="65504"):
        encode_update("fp16", {"w": np.float32([1e6])}, {"w": np.float32([0])})


REFERENCE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 2}, "version 2"),
        ({"codec": "zip"}, "codec 'zip'; expected fp16, fp32, int8"),
        ({"tensors": [{"name": "x", "shape": [], "data": b"1234"}]}, "'x': unknown tensor"),
        (
            {"tensors": [{"name": "w", "shape": [3, 2], "data": b"1234" * 6}]},
            r"w: shape \[3, 2\], expected \[2, 3\]",
        ),
        (
            {"tensors": [{"name": "w", "shape": [2, 3], "data": b"1234" * 5}]},
            "w: 20 bytes of fp32, expected 24",
        ),
        ({"tensors": [{"name": "b", "shape": [], "data": b"1234"}] * 2}, "twice"),
        ({"tensors": 3}, "malformed"),
        ({"tensors": [{"name": "b", "shape": [], "data": b"1" * 9999}]}, "at most"),
    ],
)
def test_an_update_that_does_not_fit_is_refused(change, said):
    update = {"v": 1, "codec": "fp32", "tensors": []} | change
    with pytest.raises(WireError, match=said):
        decode_update(msgspec.msgpack.encode(update), REFERENCE)


def test_another_codec_than_agreed_is_refused():
    with pytest.raises(WireError, match="'fp16'; expected fp32"):
        decode_update(encode_update("fp16", REFERENCE, REFERENCE), REFERENCE, codec="fp32")


def test_every_problem_is_listed_on_encode():
    with pytest.raises(
        WireError, match=r"x: not in the reference; w: shape \[1\], the reference has \[2, 3\]"
    ):
        encode_update("fp32", {"x": np.zeros(1), "w": np.zeros(1)}, REFERENCE)


def test_an_unknown_codec_names_those_there_are():
    with pytest.raises(UnknownName, match="no codec 'zip'; have: fp16, fp32, int8"):
        encode_update("zip", {}, {})


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(sorted(CODECS)),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
    tail=st.binary(max_size=8),
)
def test_any_mutation_decodes_to_right_shapes_or_is_refused(codec, edits, cut, tail):
    payload = bytearray(encode_update(codec, REFERENCE, REFERENCE))
    for place, byte in edits:
        payload[place % len(payload)] = byte
    content = bytes(payload) if cut > len(payload) else bytes(payload[:cut]) + tail
    try:
        decoded = decode_update(content, REFERENCE)
    except WireError:
        return
    for name, value in decoded.items():
        assert value.shape == REFERENCE[name].shape
        assert np.isfinite(value).all()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(WireError):
        decode_update(content, REFERENCE)
