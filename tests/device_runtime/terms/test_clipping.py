"""The norm that one update may have, by hand."""

import numpy as np
import pytest

from fleetune.device_runtime.terms.clipping import clipped

HELD = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[3.0, 4.0]], np.float32)}


def moved(by):
    return {name: (value + np.float32(by)).astype(np.float32) for name, value in HELD.items()}


def test_a_change_within_the_limit_is_the_very_same_arrays():
    values = moved(0.5)
    found = clipped(values, HELD, rms_max=0.5)
    assert found.values is values
    assert (found.norm, found.scale) == (1.0, 1.0), "0.5 of each of four"


def test_a_larger_one_is_scaled_over_all_tensors_together():
    values = {"a": HELD["a"] + np.float32(4), "b": HELD["b"]}
    found = clipped(values, HELD, rms_max=1.0)
    assert found.norm == pytest.approx(np.sqrt(32))
    assert found.scale == pytest.approx(2 / np.sqrt(32))
    assert np.allclose(found.values["a"] - HELD["a"], np.sqrt(2), atol=1e-6)
    assert np.array_equal(found.values["b"], HELD["b"])
    assert found.values["a"].dtype == np.float32
    assert clipped(found.values, HELD, rms_max=1.0).norm == pytest.approx(2.0, rel=1e-6)


def test_0_is_no_limit():
    assert clipped(moved(1e6), HELD, rms_max=0.0).scale == 1.0
