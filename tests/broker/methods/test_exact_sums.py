import tracemalloc
from fractions import Fraction

import numpy as np
import pytest

from fleetune.broker.methods import exact_sums
from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import WEIGHT_MAX, add_to_sums

SHAPES = {"large": (5, 7), "scalar": (), "none": (0, 3), "small": (2,), "z": (3, 3)}
BITS, NUM = 50, 4


def drawn(num, dtype, *, scale=lambda rng: 2.0 ** rng.integers(-60, 18), names=SHAPES, seed=0):
    """Updates of mixed magnitudes, and weights of all sizes."""
    rng = np.random.default_rng(seed)
    return [
        (
            {n: (rng.standard_normal(SHAPES[n]) * scale(rng) * 0.1).astype(dtype) for n in names},
            int(rng.integers(1, 2 ** rng.integers(2, 29))),
        )
        for _ in range(num)
    ]


def summed(updates):
    sums = Sums(SHAPES)
    for values, weight in updates:
        add_to_sums(sums, values, weight)
    return sums


def expected(updates, name):
    """Limbs by integers of any length: the unique form of the exact sum of products that are whole at 2**-150."""
    shape = SHAPES[name]
    totals = np.zeros(shape, object)
    for values, weight in updates:
        if name in values:
            for at, value in np.ndenumerate(np.float64(values[name]) * weight):
                totals[at] += round(Fraction(float(value)) * 2 ** (BITS * (NUM - 1)))
    return np.array([limbs_of(int(total)) for total in totals.reshape(-1)]).reshape(*shape, NUM)


def limbs_of(total):
    limbs = []
    for _ in range(NUM - 1):
        low = (total + 2 ** (BITS - 1)) % 2**BITS - 2 ** (BITS - 1)
        limbs.insert(0, low)
        total = (total - low) >> BITS
    return [total, *limbs]


def found(sums, name):
    limbs = sums.limbs(name)
    blank = np.zeros(SHAPES[name], np.int64)
    return np.stack([*limbs, *[blank] * (NUM - len(limbs))], axis=-1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [4, 2**14])
def test_limbs_are_those_of_whole_numbers_of_any_length(dtype, block, monkeypatch):
    monkeypatch.setattr(exact_sums, "_BLOCK", block)
    updates = drawn(40, dtype)
    sums = summed(updates)
    for name in SHAPES:
        assert found(sums, name).tolist() == expected(updates, name).tolist(), name


@pytest.mark.parametrize("block", [5, 2**14])
def test_updates_of_some_tensors_fill_their_own_places(block, monkeypatch):
    monkeypatch.setattr(exact_sums, "_BLOCK", block)
    updates = [
        *drawn(5, np.float32, names=("z", "large")),
        *drawn(5, np.float32, names=("small", "scalar"), seed=1),
        *drawn(5, np.float64, names=("z",), seed=2),
    ]
    sums = summed(updates)
    for name in SHAPES:
        assert found(sums, name).tolist() == expected(updates, name).tolist(), name
        assert sums.weights[name] == sum(weight for values, weight in updates if name in values)


def test_values_of_both_widths_add_up_in_one_update():
    (values, weight), *_ = drawn(1, np.float32)
    mixed = {**values, "z": np.float64(values["z"])}
    for name in SHAPES:
        assert (
            found(summed([(mixed, weight)]), name).tolist()
            == found(summed([(values, weight)]), name).tolist()
        )


def test_no_limb_overflows_however_large_what_is_added():
    top = {name: np.full(shape, 2.0**20, np.float32) for name, shape in SHAPES.items()}
    updates = [(top, WEIGHT_MAX)] * 4095
    sums = summed(updates)
    assert set(sums.total("z").reshape(-1)) == {4095 * 2.0**49}


def test_small_values_are_carried_once_in_4096_additions(monkeypatch):
    carried, carry = [], Sums._carry
    monkeypatch.setattr(Sums, "_carry", lambda sums: (carried.append(1), carry(sums)))
    tiny = {name: np.full(shape, 2.0**-40 / 3) for name, shape in SHAPES.items()}
    sums = summed([(tiny, 3)] * 4096)
    assert carried == []
    add_to_sums(sums, tiny, 3)
    assert carried == [1]
    assert sums.total("scalar") == 4097 * (2.0**-40 / 3 * 3)


def test_carrying_in_between_changes_no_bit():
    updates = drawn(12, np.float32)
    sums = Sums(SHAPES)
    for values, weight in updates:
        add_to_sums(sums, values, weight)
        sums.limbs("z")
    for name in SHAPES:
        assert found(sums, name).tolist() == found(summed(updates), name).tolist()


def test_limbs_are_added_only_where_values_need_them():
    whole = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}
    assert len(summed([(whole, 1000)]).limbs("z")) == 1
    assert len(summed([(whole, 1)]).limbs("z")) == 2
    assert len(summed([({"z": np.full((3, 3), 2.0**-101)}, 1)]).limbs("small")) == 4


def test_values_that_are_views_of_a_payload_stay_as_they_are():
    values = {"z": np.frombuffer(np.arange(9, dtype="<f4").tobytes(), "<f4").reshape(3, 3)}
    assert summed([(values, 7)]).total("z").tolist() == (7 * np.arange(9.0).reshape(3, 3)).tolist()
    assert values["z"].tolist() == np.arange(9.0).reshape(3, 3).tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("block", [4, 2**14])
def test_a_mean_is_the_sum_rounded_then_divided_then_as_it_is_wanted(dtype, block, monkeypatch):
    monkeypatch.setattr(exact_sums, "_BLOCK", block)
    sums = summed(drawn(5, np.float32))
    for name in SHAPES:
        wanted = (sums.total(name) / sums.weights[name]).astype(dtype)
        assert sums.mean(name, dtype).tobytes() == wanted.tobytes()
        assert sums.mean(name, dtype).shape == SHAPES[name]


def test_a_mean_takes_no_memory_but_its_own():
    size = 500_000
    sums = Sums({"w": (size,)})
    add_to_sums(sums, {"w": np.full(size, 0.3, np.float32)}, 10)
    sums.limbs("w")
    tracemalloc.start()
    try:
        mean = sums.mean("w", np.float32)
        assert tracemalloc.get_traced_memory()[1] < mean.nbytes + 10 * 8 * exact_sums._BLOCK
    finally:
        tracemalloc.stop()
