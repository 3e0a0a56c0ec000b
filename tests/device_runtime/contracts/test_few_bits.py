"""Codecs of few bits by hand: packed integers, quantised elements, positions, innovations, Caesar's recovery."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.codecs import (
    by_nearest,
    is_repeat,
    make_codec,
    pack,
    sizes_by_kind,
    unpack,
    with_feedback,
)
from fleetune.device_runtime.contracts.codecs.bits import WIDTHS, packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.contracts.codecs.caesar import layers_of
from fleetune.device_runtime.contracts.codecs.codec import of_kind
from fleetune.device_runtime.contracts.codecs.deflate import deflated
from fleetune.device_runtime.contracts.codecs.innovation import (
    SKIPS_MAX,
    is_lazy,
    repeating,
    skips_of,
)
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.positions import packed_positions, places_of, unpacked_positions
from fleetune.device_runtime.contracts.codecs.quantise import BLOCK, quantise, restore
from fleetune.device_runtime.errors import WireError

ZEROS = {"w": np.zeros(8, np.float32)}


def test_packed_integers_by_hand():
    assert packed_bits(np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], np.uint8), 1) == b"\x0d\x01"
    assert packed_bits(np.array([1, 2, 3, 0, 1], np.uint8), 2) == b"\x39\x01"
    assert packed_bits(np.array([1, 15, 7], np.uint8), 4) == b"\xf1\x07"
    assert packed_bits(np.array([258], np.uint16), 16) == b"\x02\x01"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 8, 9, 1000])
def test_packed_integers_come_back(width, count):
    codes = np.random.default_rng(count).integers(0, 2**width, count).astype(np.uint16)
    data = packed_bits(codes, width)
    assert len(data) == size_of(count, width)
    assert unpacked_bits(data, width, count).tolist() == codes.tolist()


@pytest.mark.parametrize("bits", [3, *WIDTHS])
@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 1000])
def test_what_a_sender_knows_is_what_is_restored(bits, count):
    flat = np.random.default_rng(count).standard_t(3, count).astype(np.float32)
    codes, scales, conveyed = quantise(flat.copy(), bits, "w")
    assert restore(codes, scales, bits, count).tobytes() == conveyed.tobytes()
    assert quantise(flat.copy(), bits, "w").codes == codes
    if count > 100 and bits > 1:
        assert quantise(flat.copy(), bits, "other").codes != codes, "the draws go by the name"


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_rounding_is_right_on_average(bits):
    blocks = np.full((2000, BLOCK), 0.3 / (2 ** (bits - 1) - 1) * 1.5, np.float32)
    blocks[:, 0] = 1.0
    step = 1 / (2 ** (bits - 1) - 1)
    conveyed = quantise(blocks.reshape(-1), bits, "w").conveyed.reshape(blocks.shape)[:, 1:]
    error = conveyed.mean(dtype=np.float64) - 1.5 * 0.3 * step
    assert abs(error) < 5 * 0.5 * step / np.sqrt(conveyed.size)
    assert np.unique(conveyed).size == 2, "one of the two neighbours"


def test_rounding_to_the_nearest_by_hand():
    flat = np.float32([7, 0.4, 0.6, -0.4, -0.6, 3.4, -3.6, -7])
    assert quantise(flat, 4, None).conveyed.tolist() == [7, 0, 1, 0, -1, 3, -4, -7]


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_the_nearest_is_at_most_half_a_step_off_and_has_half_of_the_squared_error(bits):
    flat = np.random.default_rng(bits).uniform(-1, 1, 100 * BLOCK).astype(np.float32)
    flat[::BLOCK] = 1.0
    errors = {name: np.abs(quantise(flat.copy(), bits, name).conveyed - flat) for name in ("w", None)}
    step = 1 / (2 ** (bits - 1) - 1)
    assert errors[None].max() <= 0.5 * step * 1.02 < errors["w"].max()
    assert np.square(errors[None]).sum() < 0.55 * np.square(errors["w"]).sum()


def test_two_bits_to_the_nearest_have_the_best_level_of_a_block():
    rng, lone = np.random.default_rng(0), np.eye(1, BLOCK, 5, dtype=np.float32)[0]
    for flat in (-lone, np.full(BLOCK, 3.0, np.float32), np.float32([5, -5, 0, 0])):
        np.testing.assert_allclose(quantise(flat.copy(), 2, None).conveyed, flat, rtol=0.01)
    for flat, best in ((rng.normal(0, 1, 100 * BLOCK), 0.19), (rng.uniform(-1, 1, 100 * BLOCK), 1 / 9)):
        flat = flat.astype(np.float32)
        lost = np.square(quantise(flat.copy(), 2, None).conveyed - flat).sum() / np.square(flat).sum()
        assert lost < 1.05 * best, "Max, Quantizing for Minimum Distortion, 1960, of three levels"


def test_quant_draws_unless_what_is_lost_is_sent_later_and_topk_never():
    codec, update = make_codec("quant", 0.0, 4), {"w": np.float32([7, 0.6, *[0.4] * 98])}
    reference = {"w": np.zeros(100, np.float32)}
    settled = pack(by_nearest(codec), update, reference)
    assert settled.conveyed["w"].tolist() == [7, 1, *[0] * 98]
    assert unpack(codec, settled.payload, reference).values["w"].tolist() == [7, 1, *[0] * 98]
    assert 20 < np.count_nonzero(pack(codec, update, reference).conveyed["w"]) < 60
    for made in (make_codec("topk", 1.0, 4), by_nearest(make_codec("topk", 1.0, 4))):
        assert pack(made, update, reference).conveyed["w"].tolist() == [7, 1, *[0] * 98]


def test_one_bit_is_the_sign_and_moves_as_far_as_it_should():
    flat = np.float32([1, -2, 3, -2])
    conveyed = quantise(flat.copy(), 1, "w").conveyed
    assert conveyed.tolist() == [2.25, -2.25, 2.25, -2.25], "18 / 8"
    assert conveyed @ flat == flat @ flat


def test_one_bit_is_at_most_half_more_than_the_mean_so_that_what_is_owed_cannot_grow():
    lone = np.eye(1, BLOCK, 5, dtype=np.float32)[0]
    np.testing.assert_allclose(np.abs(quantise(lone, 1, "w").conveyed), 1.5 / BLOCK, rtol=0.01)
    for tails in (1.2, 3.0):
        flat = np.random.default_rng(0).standard_t(tails, 100 * BLOCK).astype(np.float32)
        assert np.square(quantise(flat.copy(), 1, "w").conveyed - flat).sum() < np.square(flat).sum()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_largest_of_a_block_is_never_lost_and_the_tiny_are_zeros(bits):
    for peak in (2.0**-99, 1e-20, 1.0, 3e29):
        conveyed = quantise(np.float32([peak, -peak]), bits, "w").conveyed
        np.testing.assert_allclose(conveyed, [peak, -peak], rtol=0.01)
    assert not quantise(np.float32([1e-31, -1e-40]), bits, "w").conveyed.any()
    with pytest.raises(WireError, match=r"beyond 2\*\*99"):
        quantise(np.float32([1e30]), bits, "w")


@pytest.mark.parametrize("scale", [0x7F80, 0x7FC0, 0xBF80, 0x7F00])
def test_a_scale_that_cannot_be_is_refused(scale):
    with pytest.raises(WireError, match="a scale is negative, not finite"):
        restore(b"\x00", np.uint16([scale]).tobytes(), 8, 1)


def test_few_bits_with_feedback_owe_no_more_than_some_updates():
    rng, reference = np.random.default_rng(0), {"w": np.zeros(12800, np.float32)}
    for bits, worst in ((1, 2.5), (2, 8.0), (4, 0.6)):
        codec, memory = with_feedback(make_codec("quant", 0.0, bits)), {}
        for _ in range(40):
            update = {"w": (rng.standard_t(3, 12800) * 1e-3).astype(np.float32)}
            memory = pack(codec, update, reference, memory=memory).memory
        owed = np.linalg.norm(of_kind("residual", memory)["w"]) / np.linalg.norm(update["w"])
        assert owed < worst


masks = st.tuples(st.integers(0, 600), st.floats(0, 1), st.integers(0, 9))


@settings(max_examples=200, deadline=None)
@given(masks)
def test_positions_come_back(drawn):
    count, share, seed = drawn
    mask = np.random.default_rng(seed).random(count) < share
    assert unpacked_positions(packed_positions(mask), count).tolist() == mask.tolist()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.03, 0.05, 0.099, 0.1, 0.11, 0.9, 1.0])
def test_places_are_those_of_what_is_true(share):
    for count in (0, 1, 8, 1000, 70_001):
        mask = np.random.default_rng(count).random(count) < share
        assert places_of(mask).tolist() == np.flatnonzero(mask).tolist()


def test_positions_by_hand():
    mask = np.zeros(1000, bool)
    mask[[0, 3, 700]] = True
    assert packed_positions(mask) == b"\x01\x00\x02\xff\xff\xba"
    assert packed_positions(~mask) == b"\x02\x00\x02\xff\xff\xba"
    assert packed_positions(np.array([True, False, True, False])) == b"\x00\x05"


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_positions_take_little_more_than_their_information(share):
    mask = np.random.default_rng(0).random(200_000) < share
    least = -(share * np.log2(share) + (1 - share) * np.log2(1 - share)) * mask.size / 8
    assert len(deflated(packed_positions(mask))) < 1.07 * least + 80


@pytest.mark.parametrize(
    "part",
    [
        b"",
        b"\x03",
        b"\x00",
        b"\x00\x10",
        b"\x00\x01\x00",
        b"\x01\xff",
        b"\x01\x04",
        b"\x01\x00\x03",
        b"\x02\xff\x00",
    ],
)
def test_positions_that_cannot_be_are_refused(part):
    with pytest.raises(WireError, match="do not say which of 4 elements"):
        unpacked_positions(part, 4)


@pytest.mark.parametrize("dtype", ["<f2", "<f4"])
def test_planes_come_back(dtype):
    values = np.random.default_rng(0).normal(size=77).astype(dtype)
    parts = planes([values[:30], values[30:]])
    assert joined_planes(parts[LOW], parts[HIGH], dtype, 77).tobytes() == values.tobytes()
    with pytest.raises(WireError, match="bytes of values"):
        joined_planes(parts[LOW], parts[HIGH], dtype, 78)


def test_topk_with_bits_takes_the_same_elements_in_fewer_bytes():
    rng, shape = np.random.default_rng(3), (64, 384)
    values, reference = {"w": rng.standard_t(3, shape).astype(np.float32)}, {"w": np.zeros(shape, np.float32)}
    old = pack(make_codec("topk", 0.1), values, reference)
    sixteen, four = (pack(make_codec("topk", 0.1, bits), values, reference) for bits in (16, 4))
    assert sixteen.conveyed["w"].tobytes() == old.conveyed["w"].tobytes()
    assert len(sixteen.payload) < 0.75 * len(old.payload)
    assert len(four.payload) < 0.45 * len(old.payload)
    assert (four.conveyed["w"][old.conveyed["w"] == 0] == 0).all()


def test_innovation_is_the_quantiser_of_laq():
    values = {"w": np.float32([1, -1, 0.4, 0, 0.1, 0, 0, 0])}
    packed = pack(make_codec("innovation", 0.0, 2), values, ZEROS)
    third = 1 / 3
    np.testing.assert_allclose(
        packed.conveyed["w"], [1, -1, third, third, third, third, third, third], atol=1e-6
    )
    assert sizes_by_kind(packed.payload)["values"] == 2
    assert (
        of_kind("innovation", packed.memory)["w"].tobytes()
        == packed.conveyed["w"].astype(np.float32).tobytes()
    )


def test_an_innovation_shrinks_while_the_update_stays():
    codec, value = make_codec("innovation", 0.0, 3), {"w": np.float32([3, 1, -2, 0.5, 0, 1, 2, -3])}
    sender: dict = {}
    receiver: dict = {}
    errors = []
    for _ in range(6):
        payload, conveyed, sender = pack(codec, value, ZEROS, memory=sender)
        decoded, receiver = unpack(codec, payload, ZEROS, memory=receiver)
        assert decoded["w"].tobytes() == conveyed["w"].tobytes()
        errors.append(np.abs(conveyed["w"] - value["w"]).max())
    assert all(right <= left / 6.5 or right < 1e-6 for left, right in pairwise(errors))
    assert receiver.keys() == sender.keys()
    assert all(receiver[key].tobytes() == sender[key].tobytes() for key in sender)


def test_the_adaptive_level_goes_by_the_tail():
    rng, zeros = np.random.default_rng(0), {"w": np.zeros(10_000, np.float32)}
    drawn = (rng.uniform(-1, 1, 10_000), rng.normal(size=10_000), rng.standard_t(3, 10_000))
    coded = [make_codec("innovation").encode({"w": np.float32(v)}, zeros, {}) for v in drawn]
    levels = [c.parts["protocol"][0] for c in coded]
    by_hand = [int(np.log2(np.abs(v).max() * 100 / np.linalg.norm(v) + 1)) + 2 for v in drawn]
    assert levels == by_hand
    assert levels == sorted(set(levels))


def test_a_memory_of_another_shape_counts_as_none():
    codec, big = make_codec("innovation"), {"w": np.zeros(9, np.float32)}
    memory = pack(codec, {"w": np.ones(9, np.float32)}, big).memory
    packed = pack(codec, {"w": np.ones(8, np.float32)}, ZEROS, memory=memory)
    assert unpack(codec, packed.payload, ZEROS, memory=memory).values["w"].tolist() == [1] * 8


def test_an_update_is_lazy_when_the_model_moved_more_or_quantising_costs_more():
    assert is_lazy(1.0, 0.0, 1.0)
    assert not is_lazy(1.0, 0.0, 0.99)
    assert is_lazy(1.0, 0.25, 0.25)
    assert not is_lazy(1.0, 0.25, 0.24)
    assert not is_lazy(0.0, 9.0, 0.0), "nothing is known of the model's moves"
    assert not is_lazy(0.0, 9.0, float("nan"))


def test_a_repeat_is_the_last_update_over_the_new_version_and_comes_so_often_at_most():
    codec, update = make_codec("innovation", 0.0, 8), {"w": np.linspace(-1, 1, 8, dtype=np.float32)}
    sender = pack(codec, update, ZEROS).memory
    receiver, seen, first = sender, set(), sender
    for count in range(1, SKIPS_MAX + 1):
        version = {"w": np.full(8, count, np.float32)}
        payload, conveyed, sender = pack(repeating(codec), version, version, memory=sender)
        decoded, receiver = unpack(codec, payload, version, memory=receiver)
        np.testing.assert_array_equal(decoded["w"], np.float64(count) + of_kind("innovation", first)["w"])
        assert decoded["w"].tobytes() == conveyed["w"].tobytes()
        assert skips_of(receiver) == skips_of(sender) == count
        assert is_repeat(payload)
        assert len(payload) < 160
        seen.add(payload)
    assert len(seen) == SKIPS_MAX, "each is known from the one before"
    with pytest.raises(WireError, match="repeated more than 10 times in a row"):
        pack(repeating(codec), ZEROS, ZEROS, memory=sender)
    again = pack(codec, update, ZEROS, memory=sender)
    assert skips_of(again.memory) == 0
    assert not is_repeat(again.payload)


@pytest.mark.parametrize(
    "memory", [{}, {"innovation/v": np.ones(8, "f4")}, {"innovation/w": np.ones(7, "f4")}]
)
def test_a_repeat_of_what_is_not_remembered_is_refused(memory):
    held = {"w": np.zeros(8, "<f4")}
    with pytest.raises(WireError, match="w is repeated, and no update of it is remembered"):
        make_codec("innovation").decode({}, held, memory)


WANTED = {"m.layer.0.w": np.float32([5, 0.1, -0.2, 0.3, -0.4, 0.2, -0.1, -6])}
STALE = {"m.layer.0.w": np.float32([4, 0.2, 0.2, 9.0, -0.3, 0.25, -0.5, -5])}


def recovered(name):
    packed = pack(make_codec(name, 0.25), WANTED, STALE)
    decoded = unpack(make_codec(name, 0.25), packed.payload, STALE).values
    assert decoded["m.layer.0.w"].tobytes() == packed.conveyed["m.layer.0.w"].tobytes()
    return packed.conveyed["m.layer.0.w"].astype(np.float32).tolist()


def test_caesar_trusts_a_stale_value_of_its_sign_and_bound():
    mean, kept = float(np.float32(1.3 / 6)), np.float32([0.2, -0.3, 0.25]).tolist()
    low, middle, high = kept
    assert recovered("caesar") == pytest.approx([5, low, -mean, mean, middle, high, -mean, -6])
    assert recovered("caesar-sign") == pytest.approx([5, mean, -mean, mean, -mean, mean, -mean, -6])
    assert recovered("caesar-zero") == [5, 0, 0, 0, 0, 0, 0, -6]


def test_layers_are_told_by_the_first_number_of_a_name():
    names = ["a.layer.1.q", "a.layer.10.q", "a.layer.2.q.7", "a.layer.2.k.0", "head.b", "head.w"]
    assert layers_of(names) == [[names[0]], [names[1]], [names[3], names[2]], [names[4], names[5]]]
    assert layers_of([]) == []


def test_each_layer_has_its_own_largest_and_scalars():
    values = {f"l.{i}.w": np.float32([10.0**i, 1e-3, -(10.0**i) / 2, 2e-3]) for i in range(3)}
    packed = pack(make_codec("caesar-sign", 0.5), values, {n: v * 0 for n, v in values.items()})
    assert sizes_by_kind(packed.payload)["scales"] == 3 * 8
    for name, value in values.items():
        np.testing.assert_allclose(packed.conveyed[name], [value[0], 1.5e-3, value[2], 1.5e-3], rtol=1e-6)


@pytest.mark.parametrize("scalars", [[np.nan, 1], [1, np.inf], [-1, 1], [2, 1], [1, np.nan]])
def test_scalars_that_cannot_be_are_refused(scalars):
    codec = make_codec("caesar", 0.25)
    held = {n: np.asarray(v, "<f4") for n, v in STALE.items()}
    parts = codec.encode({n: np.asarray(v, "<f4") for n, v in WANTED.items()}, held, {}).parts
    with pytest.raises(WireError, match="a mean is negative, above its maximum or not finite"):
        codec.decode({**parts, "scales": np.float32(scalars).tobytes()}, held, {})
    with pytest.raises(WireError, match="signs or scalars"):
        codec.decode({**parts, "values-signs": b""}, held, {})


@pytest.mark.parametrize(
    ("part", "content", "said"),
    [
        ("scales", np.float32([np.nan]).tobytes(), "a range is negative, not finite"),
        ("scales", np.float32([-1]).tobytes(), "a range is negative"),
        ("scales", b"", "not those of 1 tensors"),
        ("protocol", b"\x00", "a level is not from 1 to 16"),
        ("protocol", b"\x11", "a level is not from 1 to 16"),
        ("protocol", b"\x03\x03", "not those of 1 tensors"),
        ("values", b"\xff\xff\xff\xff", "a value beyond its level"),
        ("values", b"", "0 bytes of values, expected 4"),
    ],
)
def test_innovations_that_cannot_be_are_refused(part, content, said):
    codec = make_codec("innovation", 0.0, 3)
    parts = codec.encode({"w": np.ones(8, np.float32)}, ZEROS, {}).parts
    with pytest.raises(WireError, match=said):
        codec.decode({**parts, part: content}, ZEROS, {})


def test_halves_of_caesar_refuse_what_they_cannot_hold():
    with pytest.raises(WireError, match="beyond 65504 does not fit caesar with 16 bits"):
        pack(make_codec("caesar", 1.0, 16), {"w": np.full(8, 1e6, np.float32)}, ZEROS)
