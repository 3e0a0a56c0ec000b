"""Float32 that share their lowest bits with a reference."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, shortened_sums
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.short_floats import shortened

F = np.float32


def values(seed, size=20_000):
    rng = np.random.default_rng(seed)
    return (rng.standard_t(3, size) * 10.0 ** rng.integers(-6, 6, size)).astype(F)


@pytest.mark.parametrize("bits", [0, 4, 10, 16, 22, 23])
def test_the_lowest_bits_are_the_references_and_no_nearer_number_has_them(bits):
    value, like = values(1), values(2)
    found = shortened(value, like, bits)
    step = 1 << (23 - bits)
    assert np.array_equal(found.view("u4") % step, like.view("u4") % step)
    error = np.abs(np.float64(found) - value)
    for neighbour in (found.view("i4") + step, found.view("i4") - step):
        is_nearest = error <= np.abs(np.float64(neighbour.view(F)) - value)
        assert is_nearest.mean() > (0.995 if bits > 4 else 0.9), "but beside powers of two"
    assert (error <= 2.0**-bits * np.abs(value)).all()
    assert np.array_equal(np.signbit(found), np.signbit(value))


def test_to_no_reference_is_rounding_of_the_significand():
    value = np.array([1.0, 1.03125, 1.031, -1.09, 0.0, -0.0, 3.999], F)
    expected = np.array([1.0, 1.0625, 1.0, -1.0625, 0.0, -0.0, 4.0], F)
    found = shortened(value, np.zeros(7, F), 4)
    assert found.tobytes() == expected.tobytes()
    assert shortened(value, values(3, 7), 23).tobytes() == value.tobytes()


def test_the_ends_of_the_range_stay_finite_and_of_their_sign():
    top, least = np.finfo(F).max, np.finfo(F).smallest_subnormal
    value = np.array([top, -top, least, -least, 0.0], F)
    for like in (np.zeros(5, F), np.full(5, np.pi, F)):
        found = shortened(value, like, 4)
        assert np.isfinite(found).all()
        assert np.array_equal(np.signbit(found), np.signbit(value))
        assert (np.abs(found[2:]) < 1e-30).all()


def test_a_difference_to_the_bit_of_ten_bits_is_half_as_long():
    value, like = (np.random.default_rng(n).normal(0, 0.02, 30_000).astype(F) for n in (1, 2))
    sizes = [len(encode_update("xor", {"w": v}, {"w": like})) for v in (value, shortened(value, like, 10))]
    assert sizes[1] < 0.55 * sizes[0]


def sums(seed=0, classes=5, width=6):
    rng = np.random.default_rng(seed)
    labels = np.array([0, *rng.integers(1, classes - 1, 30)])  # one sample of the first, none of the last
    features, is_of = rng.normal(1, 2, (31, width)), np.eye(classes)[labels]
    return {SUMS: is_of.T @ features, COUNTS: is_of.sum(0), SQUARES: is_of.T @ np.square(features).sum(1)}


@pytest.mark.parametrize("seed", range(5))
def test_rounded_sums_are_of_the_same_samples_and_what_samples_can_have(seed):
    found, exact = shortened_sums(sums(seed), 4), sums(seed)
    assert np.array_equal(found[COUNTS], exact[COUNTS])
    np.testing.assert_allclose(found[SUMS], exact[SUMS], rtol=2.0**-5)
    assert (np.square(np.float64(found[SUMS])).sum(1) <= found[COUNTS] * found[SQUARES] * (1 + 1e-9)).all()
    np.testing.assert_allclose(found[SQUARES], exact[SQUARES], rtol=0.05)
    assert not found[SUMS][-1].any()


def test_without_bits_sums_are_as_they_were():
    exact = sums()
    assert shortened_sums(exact, 0) is exact
