"""Float16 by whole vectors: the same bits as numpy's, element by element."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.codecs.halves import halved, widened
from fleetune.device_runtime.errors import WireError

EVERY = np.arange(2**16, dtype="<u2").view("<f2")
FINITE = EVERY[np.isfinite(EVERY)]
LARGEST = np.float64(65519.99)


def neighbours(dtype):
    """Every half, what lies between two, next to that on either side, and what rounds to the largest and to zeros."""
    halves = np.sort(FINITE.astype(np.float64))
    middles = ((halves[1:] + halves[:-1]) / 2).astype(dtype)
    inf = np.array(np.inf, dtype)
    ends = np.array([LARGEST, -LARGEST, 0.0, -0.0, 1e-45, -1e-40, 2.0**-25, -(2.0**-25)], dtype)
    return np.concatenate(
        [FINITE.astype(dtype), middles, np.nextafter(middles, inf), np.nextafter(middles, -inf), ends]
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_is_that_of_ieee_754(dtype):
    values = neighbours(dtype)
    halves, wide = halved(values, what="a value", codec="x")
    assert halves.tobytes() == values.astype("<f2").tobytes()
    assert wide.dtype == dtype
    assert wide.tobytes() == values.astype("<f2").astype(dtype).tobytes()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bad", [65520, -65520, 3e38, np.inf, -np.inf, np.nan])
def test_what_no_half_holds_is_refused(dtype, bad):
    with pytest.raises(WireError, match="cannot pack: a value beyond 65504 does not fit x"):
        halved(np.array([0, bad], dtype), what="a value", codec="x")


def test_every_half_widens_to_itself():
    assert widened(FINITE).tobytes() == FINITE.astype("<f4").tobytes()
    wide = widened(EVERY)
    assert np.isfinite(wide).tolist() == np.isfinite(EVERY).tolist()
    assert widened(EVERY[:0]).size == 0


@pytest.mark.parametrize("few", [0, 5, 3000])
def test_few_subnormal_ones_among_others_are_those_of_numpy(few):
    rng = np.random.default_rng(few)
    values = (rng.choice([-1, 1], 70_000) * rng.lognormal(0, 2, 70_000)).astype(np.float32)
    values = np.clip(values, -65504, 65504)
    values[rng.integers(70_000, size=few)] = rng.normal(0, 2e-5, few)
    values[: few // 2] = 0
    halves, wide = halved(values, what="a value", codec="x")
    assert halves.tobytes() == values.astype("<f2").tobytes()
    assert wide.tobytes() == widened(halves).tobytes() == halves.astype("<f4").tobytes()
