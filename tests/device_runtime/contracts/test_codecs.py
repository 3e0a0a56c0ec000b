"""Laws that every codec obeys, the bytes of 0.1.0, and decoders that survive anything."""

import json
import re

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA, ROOT
from safetensors.numpy import load

from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.codecs import (
    CODECS,
    decode_update,
    encode_update,
    make_codec,
    pack,
    reference_of,
    sizes_by_kind,
    unpack,
    update_bytes_max,
    with_feedback,
)
from fleetune.device_runtime.contracts.codecs.codec import Codec, Decoded, Encoded, as_kind, of_kind
from fleetune.device_runtime.contracts.codecs.int8 import int8
from fleetune.device_runtime.errors import ConfigError, UnknownName, WireError

# Codec, ratio, bits, and largest error of what is sent for a difference of magnitude 1: the test lines of a codec.
CASES: dict[str, tuple[str, float, int, float]] = {
    "fp32": ("fp32", 0.0, 0, 0.0),
    "fp16": ("fp16", 0.0, 0, 2.0**-11),
    "int8": ("int8", 0.0, 0, 0.5 / 127 * 1.001),
    "topk": ("topk", 0.1, 0, 1.0),
    "topk-16": ("topk", 0.1, 16, 1.0),
    "topk-8": ("topk", 0.6, 8, 1.0),
    "topk-4": ("topk", 0.1, 4, 1.0),
    "quant-1": ("quant", 0.0, 1, 1.0),
    "quant-2": ("quant", 0.0, 2, 1.01),
    "quant-3": ("quant", 0.0, 3, 1.01 / 3),
    "quant-4": ("quant", 0.0, 4, 1.01 / 7),
    "quant-8": ("quant", 0.0, 8, 1.01 / 127),
    "quant-16": ("quant", 0.0, 16, 1.01 / 32767),
    "innovation": ("innovation", 0.0, 0, 1.01 / 7),
    "innovation-1": ("innovation", 0.0, 1, 1.01),
    "innovation-3": ("innovation", 0.0, 3, 1.01 / 7),
    "innovation-16": ("innovation", 0.0, 16, 1.01 / 65535),
    "xor": ("xor", 0.0, 0, 0.0),
    "caesar": ("caesar", 0.4, 0, 0.5),
    "caesar-16": ("caesar", 0.4, 16, 0.5),
    "caesar-sign": ("caesar-sign", 0.4, 0, 0.5),
    "caesar-zero": ("caesar-zero", 0.4, 0, 0.5),
}
FORGETFUL = ("caesar-16", "caesar-sign", "caesar-zero")
"""What does not keep an unchanged tensor: they convey values, not differences."""
OLD = json.loads((DATA / "codecs_0_1_0.json").read_text())
SHAPES = [(), (0,), (1,), (3, 0, 2), (255,), (256,), (257,), (7, 100)]
each_codec = pytest.mark.parametrize("name", sorted(CASES))
BY_TENSOR = sorted(
    name for name, (codec, _, bits, _) in CASES.items() if make_codec(codec, 1.0, bits).frame == 1
)
BY_KIND = sorted(CASES.keys() - set(BY_TENSOR))


def codec_of(name: str) -> Codec:
    codec, ratio, bits, _ = CASES[name]
    return make_codec(codec, ratio, bits)


def tensors(seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    draw = {str(s): rng.uniform(-0.5, 0.5, s).astype(np.float32) for s in shapes}
    return draw, {name: np.asarray(rng.uniform(-0.5, 0.5, v.shape), np.float32) for name, v in draw.items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)


def test_every_codec_has_its_line_here_and_in_the_docs():
    assert {codec for codec, *_ in CASES.values()} == CODECS.keys()
    told = (ROOT / "docs" / "protocol.md").read_text()
    assert [name for name in CODECS if f"\n| `{name}` |" not in told] == []


@each_codec
def test_law_a_round_trip_keeps_shapes_and_stays_within_the_bound(name):
    values, reference = tensors(0)
    decoded = unpack(codec_of(name), pack(codec_of(name), values, reference).payload, reference).values
    assert decoded.keys() == values.keys()
    for tensor, value in decoded.items():
        assert value.dtype in (np.float32, np.float64)
        assert value.shape == values[tensor].shape
        rounding = 1e-7 if name in BY_KIND else 0.0
        assert np.abs(value - values[tensor]).max(initial=0) <= CASES[name][3] + rounding


@each_codec
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_law_one_element_comes_back_within_the_bound(name, shape):
    for value, held in ((0.25, -0.5), (-0.0, 0.0), (1e-42, 0.0), (3.0, 3.0)):
        values, reference = {"w": np.full(shape, value, np.float32)}, {"w": np.full(shape, held, np.float32)}
        decoded = unpack(codec_of(name), pack(codec_of(name), values, reference).payload, reference).values
        assert decoded["w"].shape == shape
        assert np.abs(decoded["w"] - values["w"]).max() <= CASES[name][3] + 1e-7


@each_codec
def test_law_zeros_come_back_as_zeros(name):
    zeros = {str(shape): np.zeros(shape, np.float32) for shape in SHAPES}
    decoded = unpack(codec_of(name), pack(codec_of(name), zeros, zeros).payload, zeros).values
    assert not any(value.any() for value in decoded.values())


@each_codec
@pytest.mark.parametrize("shapes", [[], [()], [(0,)], SHAPES, [(200, 300)]])
def test_law_every_byte_is_of_one_kind(name, shapes):
    values, reference = tensors(8, shapes)
    payload = pack(codec_of(name), values, reference).payload
    sizes = sizes_by_kind(payload)
    assert sum(sizes.values()) == len(payload)
    assert min(sizes.values()) >= 0
    assert sizes["protocol"] <= update_bytes_max(codec_of("fp32"), values) - 4 * sum(
        v.size for v in values.values()
    )


@each_codec
def test_law_a_sender_knows_to_the_bit_what_it_conveyed(name):
    values, reference = tensors(6)
    packed = pack(codec_of(name), values, reference)
    assert same_bits(packed.conveyed, unpack(codec_of(name), packed.payload, reference).values)


@each_codec
@pytest.mark.parametrize("shapes", [[shape] for shape in SHAPES] + [SHAPES, [*SHAPES, (200, 300)], []])
def test_law_no_payload_exceeds_its_bound(name, shapes):
    rng = np.random.default_rng(1)
    noise = {str(s): np.frombuffer(rng.bytes(4 * int(np.prod(s))), "<u4").reshape(s) % 2**30 for s in shapes}
    values = {n: bits.astype("<u4").view("<f4") for n, bits in noise.items()}
    size = len(pack(codec_of(name), values, {n: v * 0 for n, v in values.items()}).payload)
    assert size <= update_bytes_max(codec_of(name), values)


@each_codec
def test_the_bound_is_of_use(name):
    values, reference = tensors(1, [(200, 300), (7,)])
    size = len(pack(codec_of(name), values, reference).payload)
    loose = {"innovation": 7.0}.get(name, 1.25 if name in BY_TENSOR else 2.1)
    assert update_bytes_max(codec_of(name), reference) <= loose * size + 1000


@pytest.mark.parametrize("name", sorted(CASES.keys() - set(FORGETFUL)))
def test_law_an_unchanged_tensor_comes_back_to_the_bit(name):
    values, _ = tensors(2)
    decoded = unpack(codec_of(name), pack(codec_of(name), values, values).payload, values).values
    assert same_bits({n: v.astype(np.float32) for n, v in decoded.items()}, values)


@each_codec
def test_law_equal_values_give_equal_bytes_whatever_their_order(name):
    values, reference = tensors(3)
    backwards = dict(reversed(values.items()))
    again = pack(codec_of(name), backwards, dict(reversed(reference.items())))
    assert pack(codec_of(name), values, reference).payload == again.payload


@each_codec
def test_law_a_subset_of_the_tensors_may_be_sent(name):
    codec, (values, reference) = codec_of(name), tensors(4)
    payload = pack(codec, {"(1,)": values["(1,)"]}, reference).payload
    assert unpack(codec, payload, reference).values.keys() == {"(1,)"}
    assert unpack(codec, pack(codec, {}, reference).payload, reference).values == {}


@each_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_law_what_is_not_finite_is_refused_on_encode(name, bad):
    good, reference = np.zeros(3, np.float32), {"w": np.zeros(3, np.float32)}
    with pytest.raises(WireError, match="w: not finite"):
        pack(codec_of(name), {"w": np.where([1, 0, 0], np.float32(bad), good)}, reference)


NOT_FINITE = {
    "fp32": np.float32([np.nan, 0, 0]).tobytes(),
    "fp16": np.float16([0, np.inf, 0]).tobytes(),
    "int8": np.float32([np.nan]).tobytes() + bytes(3),
    "topk": b"\x00\x01" + np.float16([np.inf]).tobytes(),
}


@pytest.mark.parametrize("name", BY_TENSOR)
def test_law_what_is_not_finite_is_refused_on_decode(name):
    reference = {"w": np.zeros(3, np.float32)}
    update = msgspec.msgpack.decode(pack(codec_of(name), reference, reference).payload)
    update["tensors"][0]["data"] = NOT_FINITE[name]
    with pytest.raises(WireError, match=r"finite|NaN"):
        decode_update(msgspec.msgpack.encode(update), reference)


@pytest.mark.parametrize("name", BY_KIND)
def test_law_what_is_not_finite_is_refused_on_decode_by_kind_too(name):
    """All bits set: NaN as float32, as the upper half of one, and with all lower bytes as float16."""
    values, _ = tensors(9, [(300,)])
    reference = {tensor: np.zeros_like(value) for tensor, value in values.items()}
    fields = msgspec.msgpack.decode(pack(codec_of(name), values, reference).payload)
    told = {part: size for part, (size, _) in fields["parts"].items()}
    spoilt = ["scales"] if "scales" in told else [part for part in told if part != "positions"]
    fields["parts"] |= {part: [told[part], b"\xff" * told[part]] for part in spoilt}
    with pytest.raises(WireError, match=r"finite|NaN"):
        unpack(codec_of(name), msgspec.msgpack.encode(fields), reference)


@each_codec
def test_law_feedback_conserves_what_was_to_be_sent(name):
    rng = np.random.default_rng(5)
    codec, reference = with_feedback(codec_of(name)), {"w": rng.normal(size=300).astype(np.float32)}
    memory: dict = {}
    held: dict = {}
    wanted, conveyed = np.zeros(300), np.zeros(300)
    for _ in range(5):
        values = {"w": (reference["w"] + rng.normal(0, 0.01, 300)).astype(np.float32)}
        payload, _, memory = pack(codec, values, reference, memory=memory)
        wanted += np.float64(values["w"]) - reference["w"]
        decoded, held = unpack(codec, payload, reference, memory=held)
        conveyed += np.float64(decoded["w"]) - reference["w"]
    np.testing.assert_allclose(conveyed + of_kind("residual", memory).get("w", 0), wanted, atol=1e-14)


@each_codec
def test_law_memory_is_flat_of_declared_kinds_and_survives_a_file(name):
    codec, (values, reference) = with_feedback(codec_of(name)), tensors(7)
    first = pack(codec, values, reference)
    assert {key.split("/", 1)[0] for key in first.memory} <= set(codec.sender)
    resumed = load(to_bytes(first.memory)) if first.memory else {}
    on, off = (pack(codec, reference, reference, memory=memory) for memory in (first.memory, resumed))
    assert on.payload == off.payload
    assert same_bits(on.memory, off.memory)


@pytest.mark.parametrize("name", ["fp32", "xor"])
def test_a_lossless_codec_keeps_every_bit_and_leaves_no_residual(name):
    value = np.array([0.0, -0.0, 1e-45, 3.4e38, -1.1754942e-38, 1 / 3], np.float32)
    reference = {"w": np.full(6, 1e20, np.float32)}
    packed = pack(with_feedback(codec_of(name)), {"w": value}, reference)
    decoded = unpack(codec_of(name), packed.payload, reference).values["w"]
    assert decoded.astype(np.float32).tobytes() == value.tobytes()
    assert packed.memory == {}


def of_0_1_0():
    i = np.arange(300)
    reference = {
        "a": ((i * 37 % 101) / 64 - 0.75).astype(np.float32).reshape(15, 20),
        "b": np.float32(0.5).reshape(()),
        "c": np.zeros((0,), np.float32),
        "d": np.float32([1e-3, -2.0, 3.5]),
    }
    moved = ((i * 53 % 97) / 4096 - 0.01).astype(np.float32).reshape(15, 20)
    values = reference | {
        "a": reference["a"] + moved,
        "b": np.float32(0.25).reshape(()),
        "d": np.float32([1e-3, -2.0, -0.0]),
    }
    residual = {"a": ((i * 29 % 89) / 65536 - 0.0005).reshape(15, 20), "d": np.float64([1e-9, 0, 2e-5])}
    return values, reference, residual


@pytest.mark.parametrize("name", sorted(OLD))
def test_payloads_and_residuals_are_those_of_0_1_0_to_the_byte(name):
    values, reference, residual = of_0_1_0()
    assert pack(codec_of(name), values, reference).payload.hex() == OLD[name]["payload"]
    owing = pack(with_feedback(codec_of(name)), values, reference, memory=as_kind("residual", residual))
    assert owing.payload.hex() == OLD[name]["with_residual"]
    left = {n: v.tobytes().hex() for n, v in of_kind("residual", owing.memory).items()}
    assert left == OLD[name]["left"]


def one(codec: Codec, value, reference=None):
    """The part of a single tensor ``w``."""
    value = np.float32(value)
    held = np.zeros_like(value) if reference is None else np.float32(reference)
    return codec.encode({"w": value}, {"w": held}, {}).parts["w"]


def test_int8_by_hand():
    part = one(int8, [1.27, -0.635, 0.004])
    assert np.frombuffer(part[:4], "<f4")[0] == pytest.approx(0.01)
    assert list(part[4:]) == [127, 256 - 63, 0]  # -63.5 steps, a hair less for the scale rounded up


@pytest.mark.parametrize("peak", [1e-45, 1e-40, 1e-30, 3e38])
def test_int8_scales_hold_at_the_ends_of_the_range(peak):
    value, reference = {"w": np.array([peak, -peak], np.float32)}, {"w": np.zeros(2, np.float32)}
    decoded = pack(int8, value, reference).conveyed["w"]
    assert np.abs(decoded - value["w"]).max() <= max(peak, 1e-45) * (0.5 if peak > 1e-42 else 1)


def test_topk_by_hand_takes_the_largest_of_all_tensors():
    reference = {"a": np.zeros(4, np.float32), "b": np.zeros((2, 2), np.float32)}
    values = {"a": np.float32([0.5, -4, 0.25, 1]), "b": np.float32([[0, 8], [-1, 0.125]])}
    coded = make_codec("topk", 3 / 8).encode(values, reference, {})
    assert coded.conveyed["a"].tolist() == [0, -4, 0, 1], "of equal magnitudes the first by name and place"
    assert coded.conveyed["b"].tolist() == [[0, 8], [0, 0]]
    assert coded.parts["a"] == b"\x00\x0a" + np.float16([-4, 1]).tobytes()


def test_topk_lists_few_places_and_maps_many():
    value = np.zeros(1000, np.float32)
    value[[7, 900]] = [2, -1]
    few = b"\x01" + np.uint32([7, 900]).tobytes() + np.float16([2, -1]).tobytes()
    assert one(make_codec("topk", 0.5), value) == few, "zeros do not travel"
    assert len(one(make_codec("topk", 0.5), np.arange(1, 1001))) == 1 + 125 + 2 * 500


def test_topk_sends_in_time_what_it_left():
    codec, reference = with_feedback(make_codec("topk", 0.25)), {"w": np.zeros(4, np.float32)}
    packed = pack(codec, {"w": np.float32([1, 2, 4, 3])}, reference)
    sent = [packed.conveyed["w"].tolist()]
    for _ in range(3):
        packed = pack(codec, reference, reference, memory=packed.memory)
        sent.append(packed.conveyed["w"].tolist())
    assert sent == [[0, 0, 4, 0], [0, 0, 0, 3], [0, 2, 0, 0], [1, 0, 0, 0]]
    assert packed.memory == {}


@pytest.mark.parametrize(
    "part",
    [
        b"", b"\x02", b"\x00", b"\x00\x10", b"\x00\x11", b"\x00\x01", b"\x00\x00\x00", b"\x01\x00",
        b"\x01" + np.uint32([4]).tobytes() + bytes(2),
        b"\x01" + np.uint32([2, 2]).tobytes() + bytes(4),
        b"\x01" + np.uint32([2, 1]).tobytes() + bytes(4),
    ],
)  # fmt: skip
def test_topk_refuses_places_that_cannot_be(part):
    with pytest.raises(WireError, match="w: topk"):
        make_codec("topk", 1.0).decode({"w": part}, {"w": np.zeros(4, np.float32)}, {})


@pytest.mark.parametrize("sizes", [(4, 4, 4, 3), (5, 4, 4, 4), (4, 0, 4, 4), (16, 0, 0, 0)])
def test_xor_refuses_what_is_no_four_ranks(sizes):
    parts = {f"values-{rank}": bytes(size) for rank, size in enumerate(sizes)}
    with pytest.raises(WireError, match=re.escape(f"xor: ranks of {[*sizes]} bytes, expected 4 each")):
        make_codec("xor").decode(parts, {"w": np.zeros(4, np.float32)}, {})


def test_xor_leaves_the_ranks_that_are_noise_and_deflates_the_others():
    rng = np.random.default_rng(0)
    reference = {"w": rng.normal(size=10_000).astype(np.float32)}
    near = {"w": (reference["w"] * (1 + rng.normal(0, 1e-3, 10_000))).astype(np.float32)}
    payload = encode_update("xor", near, reference)
    ranks = (near["w"].view("<u4") ^ reference["w"].view("<u4")).view(np.uint8).reshape(-1, 4).T
    sent = msgspec.msgpack.decode(payload)["parts"]
    assert [sent["values-0"][1], sent["values-1"][1]] == [ranks[0].tobytes(), ranks[1].tobytes()]
    assert [len(sent[part][1]) < 9_000 for part in ("values-2", "values-3")] == [True, True]
    assert len(encode_update("xor", reference, reference)) < 300, "nothing changed"
    few = {"w": np.where(np.arange(10_000) % 20, reference["w"], near["w"])}
    assert len(encode_update("xor", few, reference)) < 0.2 * len(payload), "a twentieth changed"


def last_sent() -> Codec:
    """Send the step from what was sent last; both sides remember it. A toy, to hold the seam for memory on either side."""

    def encode(values, reference, memory):
        last = of_kind("last", memory)
        parts = {n: (v - last.get(n, reference[n])).astype("<f4").tobytes() for n, v in values.items()}
        decoded = decode(parts, reference, memory)
        return Encoded(parts, decoded.values, decoded.memory)

    def decode(parts, reference, memory):
        last = of_kind("last", memory)
        steps = {n: np.frombuffer(p, "<f4").reshape(reference[n].shape) for n, p in parts.items()}
        now = {n: np.float64(last.get(n, reference[n])) + step for n, step in steps.items()}
        return Decoded(now, {**memory, **as_kind("last", now)})

    return Codec("last", encode, decode, lambda shapes: 10**6, sender=("last",), receiver=("last",))


def test_memory_of_either_side_goes_from_payload_to_payload():
    codec, reference = last_sent(), {"w": np.zeros(2, np.float32)}
    sender: dict = {}
    receiver: dict = {}
    for value in ([1, 2], [1, 3], [1, 3]):
        payload, _, sender = pack(codec, {"w": np.float32(value)}, reference, memory=sender)
        decoded, receiver = unpack(codec, payload, reference, memory=receiver)
        assert decoded["w"].tolist() == value
    assert of_kind("last", receiver)["w"].tolist() == [1, 3]


def test_feedback_and_the_memory_of_the_codec_within_are_kept_apart():
    reference = {"w": np.zeros(2, np.float32)}
    packed = pack(with_feedback(last_sent()), {"w": np.float32([1, 2])}, reference)
    assert packed.memory.keys() == {"last/w"}
    other = pack(with_feedback(codec_of("int8")), {"w": np.float32([1, 2])}, reference, memory=packed.memory)
    assert "last/w" not in other.memory, "of another codec"


def test_the_exact_bytes_of_an_update():
    update = encode_update("fp32", {"w": np.float32([1.0])}, {"w": np.float32([0.0])})
    expected = {
        "v": 1,
        "codec": "fp32",
        "tensors": [{"name": "w", "shape": [1], "data": b"\x00\x00\x80\x3f"}],
    }
    assert update == msgspec.msgpack.encode(expected)


def test_an_update_may_name_what_it_starts_from():
    packed = pack(codec_of("int8"), REFERENCE, REFERENCE, reference_sha256="f" * 64)
    assert reference_of(packed.payload) == "f" * 64
    assert reference_of(pack(codec_of("int8"), REFERENCE, REFERENCE).payload) == ""


def test_a_residual_of_a_tensor_not_sent_is_kept():
    reference = {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}
    owing = {"residual/b": np.float64([1, 2])}
    packed = pack(with_feedback(codec_of("fp16")), {"a": np.float32([0, 0])}, reference, memory=owing)
    assert packed.memory["residual/b"].tolist() == [1, 2]


def test_a_residual_of_another_model_is_refused():
    owing = {"residual/b": np.zeros(2), "residual/x": np.zeros(1)}
    with pytest.raises(WireError, match=r"x: not in the reference; b: shape \[2\]"):
        pack(with_feedback(codec_of("fp16")), {}, REFERENCE, memory=owing)


@pytest.mark.parametrize("name", ["fp16", "topk"])
def test_half_precision_refuses_what_it_cannot_hold(name):
    with pytest.raises(WireError, match=f"65504 does not fit {name}"):
        pack(codec_of(name), {"w": np.float32([1e6])}, {"w": np.float32([0])})


REFERENCE = {"w": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float32)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": 3}, "version 3"),
        ({"codec": "zip"}, "codec 'zip'; expected caesar, caesar-sign, caesar-zero, fp16, fp32"),
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
    payload = encode_update("fp16", REFERENCE, REFERENCE)
    with pytest.raises(WireError, match="'fp16'; expected fp32"):
        decode_update(payload, REFERENCE, codec="fp32")
    with pytest.raises(WireError, match="'fp16'; expected int8"):
        unpack(int8, payload, REFERENCE)


def test_every_problem_is_listed_on_encode():
    with pytest.raises(
        WireError, match=r"x: not in the reference; w: shape \[1\], the reference has \[2, 3\]"
    ):
        encode_update("fp32", {"x": np.zeros(1), "w": np.zeros(1)}, REFERENCE)


def test_an_unknown_codec_names_those_there_are():
    with pytest.raises(
        UnknownName, match="no codec 'zip'; have: caesar, caesar-sign, caesar-zero, fp16, fp32"
    ):
        encode_update("zip", {}, {})


@pytest.mark.parametrize(
    ("name", "ratio", "said"),
    [
        ("int8", 0.5, "codec 'int8' sends all elements and has no ratio, got 0.5"),
        ("quant", 0.5, "codec 'quant' sends all elements"),
        ("innovation", 0.5, "codec 'innovation' sends all elements"),
        ("caesar", 0.0, "codec 'caesar': its ratio is above 0 and at most 1, got 0"),
        ("caesar-zero", 1.5, "codec 'caesar-zero': its ratio is above 0"),
        ("topk", 0.0, "codec 'topk': its ratio is above 0 and at most 1, got 0"),
        ("topk", 1.5, "got 1.5"),
        ("topk", float("nan"), "got nan"),
    ],
)
def test_a_ratio_where_there_is_none_and_none_where_there_is_one(name, ratio, said):
    with pytest.raises(ConfigError, match=said):
        make_codec(name, ratio)


@pytest.mark.parametrize(
    ("name", "bits", "said"),
    [
        ("fp32", 8, "codec 'fp32' has no bits to choose, got 8"),
        ("xor", 1, "codec 'xor' has no bits to choose, got 1"),
        ("quant", 5, "codec 'quant': its bits are 1 or 2 or 3 or 4 or 8 or 16, got 5"),
        ("quant", -1, "got -1"),
        ("topk", 2, "codec 'topk': its bits are 4 or 8 or 16, got 2"),
        ("innovation", 17, "got 17"),
        ("caesar", 8, "codec 'caesar': its bits are 16 or 32, got 8"),
    ],
)
def test_bits_that_do_not_exist_are_refused(name, bits, said):
    with pytest.raises(ConfigError, match=said):
        make_codec(name, 1.0, bits)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(CASES)),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 400),
    tail=st.binary(max_size=8),
)
def test_any_mutation_decodes_to_right_shapes_or_is_refused(name, edits, cut, tail):
    values = {n: v + np.float32(0.5) for n, v in REFERENCE.items()}
    payload = bytearray(pack(codec_of(name), values, REFERENCE).payload)
    for place, byte in edits:
        payload[place % len(payload)] = byte
    check_decoded(name, bytes(payload) if cut > len(payload) else bytes(payload[:cut]) + tail)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(BY_TENSOR), part=st.binary(max_size=40))
def test_any_part_decodes_to_right_shapes_or_is_refused(name, part):
    tensor = {"name": "w", "shape": [2, 3], "data": part}
    check_decoded(name, msgspec.msgpack.encode({"v": 1, "codec": name, "tensors": [tensor]}))


def check_decoded(name: str, content: bytes) -> None:
    try:
        decoded = unpack(codec_of(name), content, REFERENCE).values
    except WireError:
        return
    for tensor, value in decoded.items():
        assert value.shape == REFERENCE[tensor].shape
        assert np.isfinite(value).all()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(content):
    with pytest.raises(WireError):
        decode_update(content, REFERENCE)
