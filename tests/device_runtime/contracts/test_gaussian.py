"""Noise by its moments, with bounds of ten standard errors and more; bounds by hand."""

import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetune.device_runtime.contracts.gaussian import bounded, derived, gaussian, new_secret

COUNT = 400_000


def norm_of(change):
    return math.sqrt(sum(float(np.square(value).sum()) for _, value in sorted(change.items())))


@pytest.mark.parametrize("source", [os.urandom, derived(b"secret")])
def test_noise_is_standard_normal_and_its_elements_are_independent(source):
    x = gaussian((COUNT,), source)
    assert abs(x.mean()) < 10 / math.sqrt(COUNT)
    assert abs(x.std() - 1) < 10 / math.sqrt(2 * COUNT)
    assert abs((x**4).mean() - 3) < 10 * math.sqrt(96 / COUNT)
    assert abs(np.mean(x > 1) - 0.158655) < 10 * math.sqrt(0.134 / COUNT)
    for lag in (1, 2, 2**15, 2**16):
        assert abs(np.corrcoef(x[lag:], x[:-lag])[0, 1]) < 10 / math.sqrt(COUNT - lag)
        assert abs(np.corrcoef(x[lag:] ** 2, x[:-lag] ** 2)[0, 1]) < 10 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2**16 + 1,)])
def test_noise_of_any_shape_is_finite(shape):
    x = gaussian(shape, os.urandom)
    assert x.shape == shape
    assert np.isfinite(x).all()


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_the_least_likely_bits_are_finite_too(byte):
    assert np.isfinite(gaussian((5,), lambda size: byte * size)).all()


def test_nobody_draws_the_same_noise_twice_but_from_the_same_secret_for_the_same_purpose():
    assert not np.array_equal(gaussian((8,), os.urandom), gaussian((8,), os.urandom))
    assert new_secret() != new_secret()
    assert len(new_secret()) == 32
    same = [gaussian((70_000,), derived(b"s", b"offer", b"update")) for _ in range(2)]
    assert np.array_equal(*same)
    assert len(np.unique(same[0])) == 70_000, "no block repeats another"
    others = [
        (b"t", b"offer", b"update"),
        (b"s", b"offerupdate"),
        (b"s", b"offe", b"rupdate"),
        (b"s", b"offer", b""),
    ]
    for parts in others:
        assert abs(np.corrcoef(gaussian((70_000,), derived(*parts)), same[0])[0, 1]) < 10 / math.sqrt(70_000)


def test_a_change_at_the_border_is_left_as_it_is_and_one_beyond_is_not():
    change = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    found = bounded(change, 5.0)
    assert found.change is change
    assert (found.norm, found.scale) == (5.0, 1.0)
    found = bounded(change, np.nextafter(5.0, 0.0))
    assert found.scale < 1
    assert norm_of(found.change) < 5.0
    assert bounded(change, 2.5).scale == pytest.approx(0.5, rel=1e-11)


@given(st.integers(1, 3000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(0, 99))
def test_no_rounding_takes_a_change_beyond_its_bound(size, scale, norm_max, seed):
    rng = np.random.default_rng(seed)
    change = {"a": scale * rng.standard_normal(size), "b": scale * rng.standard_normal(())}
    assert norm_of(bounded(change, norm_max).change) <= norm_max
