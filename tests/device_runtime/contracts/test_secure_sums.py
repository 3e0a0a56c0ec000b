"""The arithmetic of secure sums: shares, keys, the grid, masks. Hand-worked numbers, all subsets, published vectors."""

import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from fleetune.device_runtime.contracts.mask_messages import MaskPeer
from fleetune.device_runtime.contracts.secure_sums import shares
from fleetune.device_runtime.contracts.secure_sums.graph import degree_of, neighbours, threshold_of
from fleetune.device_runtime.contracts.secure_sums.grid import (
    added,
    check_numbers,
    mean_change,
    modulus_bits,
    num_elements,
    payload_bytes,
    placed,
    read_numbers,
    weight_of,
    write_numbers,
)
from fleetune.device_runtime.contracts.secure_sums.keys import (
    Scope,
    agree,
    new_secret,
    new_seed,
    own_stream,
    pair_stream,
    public_of,
    seal,
    unseal,
)
from fleetune.device_runtime.contracts.secure_sums.masking import Masker, Unmasking, mask, unmask
from fleetune.device_runtime.contracts.secure_sums.shares import PRIME, SHARE_BYTES, combine, split
from fleetune.device_runtime.contracts.work import SumGrid
from fleetune.device_runtime.errors import ConfigError, WireError

SECRET = bytes(range(32))
GRID = SumGrid(bits=8, weight_bits=4, summands=10, limit=1.0)
SCOPE = Scope("job", "1-0")
REFERENCE = {"w": np.zeros((2, 2), np.float32), "b": np.ones(1, np.float32)}
ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
ALICE_PUBLIC = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
BOB_PUBLIC = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
SHARED = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
SMALL_ORDER = [
    bytes(32),
    b"\1" + bytes(31),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f"),
]


# Shares


def test_shares_are_values_of_a_polynomial_worked_by_hand(monkeypatch):
    """2 + 3 x + 5 x^2 at 1, 2, 3 is 10, 28, 56; Lagrange's weights of 1, 2, 3 at 0 are 3, -3, 1."""
    drawn = iter([5, 3])
    monkeypatch.setattr(shares.secrets, "randbelow", lambda _: next(drawn))
    found = split((2).to_bytes(32, "little"), [1, 2, 3], 3)
    assert [int.from_bytes(found[i], "little") for i in (1, 2, 3)] == [10, 28, 56]
    assert shares.weights([1, 2, 3]) == {1: 3, 2: PRIME - 3, 3: 1}
    assert 3 * 10 - 3 * 28 + 56 == 2


def test_the_modulus_is_the_largest_prime_below_2_to_257():
    assert PRIME == 2**257 - 93
    assert _is_prime(PRIME)
    assert not any(_is_prime(2**257 - less) for less in range(1, 93, 2))


@pytest.mark.parametrize("threshold", [1, 2, 4, 6])
def test_every_subset_of_enough_shares_gives_the_secret_and_none_of_fewer(threshold):
    for secret in (SECRET, bytes(32), b"\xff" * 32):
        found = split(secret, range(1, 7), threshold)
        for count in range(1, 7):
            for chosen in combinations(found, count):
                some = {holder: found[holder] for holder in chosen}
                if count < threshold:
                    with pytest.raises(WireError, match="shares needed"):
                        combine(some, threshold)
                else:
                    assert combine(some, threshold) == secret


def test_fewer_shares_than_needed_fit_every_secret():
    """Of 2 shares of 3 and any secret there is a polynomial: they tell nothing."""
    found = split(SECRET, [1, 2, 3], 3)
    for other in (bytes(32), b"\7" * 32):
        weights = shares.weights([1, 2, 3])
        have = sum(weights[i] * int.from_bytes(found[i], "little") for i in (1, 2))
        third = (int.from_bytes(other, "little") - have) * pow(weights[3], -1, PRIME) % PRIME
        forged = {**found, 3: third.to_bytes(SHARE_BYTES, "little")}
        assert combine(forged, 3) == other


@pytest.mark.parametrize(
    ("secret", "holders", "threshold"),
    [
        (b"short", [1, 2], 2),
        (SECRET, [1, 2], 3),
        (SECRET, [1, 2], 0),
        (SECRET, [1, 1], 2),
        (SECRET, [0, 1], 2),
        (SECRET, [1, 2**20], 2),
    ],
)
def test_what_cannot_be_shared_is_refused(secret, holders, threshold):
    with pytest.raises(WireError):
        split(secret, holders, threshold)


@pytest.mark.parametrize(
    "share", [b"", bytes(32), bytes(34), b"\xff" * 33, PRIME.to_bytes(SHARE_BYTES, "little")]
)
def test_a_share_of_another_length_or_beyond_the_field_is_refused(share):
    with pytest.raises(WireError, match="share of"):
        combine({1: share, 2: bytes(SHARE_BYTES)}, 2)


def _is_prime(number):
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37):
        x = pow(base, odd, number)
        if x not in (1, number - 1) and all((x := x * x % number) != number - 1 for _ in range(twos - 1)):
            return False
    return True


# Keys


def test_keys_agree_as_in_rfc_7748():
    """Its section 6.1."""
    alice = bytes.fromhex(ALICE)
    assert public_of(alice).hex() == ALICE_PUBLIC
    assert agree(alice, bytes.fromhex(BOB_PUBLIC)).hex() == SHARED


@pytest.mark.parametrize("public", [*SMALL_ORDER, b"", bytes(31)], ids=lambda p: p.hex()[:8])
def test_a_public_key_of_small_order_or_another_length_is_refused(public):
    with pytest.raises(WireError, match="small order"):
        agree(new_secret(), public)


def test_what_is_sealed_opens_for_its_receiver_in_its_scope_alone():
    a, b, c = new_secret(), new_secret(), new_secret()
    sealed = seal(b"text", a, public_of(b), SCOPE, sender="a", receiver="b")
    assert unseal(sealed, b, public_of(a), SCOPE, sender="a", receiver="b") == b"text"
    wrong = [
        (c, public_of(a), SCOPE, "a", "b"),
        (b, public_of(c), SCOPE, "a", "b"),
        (b, public_of(a), Scope("other", "1-0"), "a", "b"),
        (b, public_of(a), Scope("job", "2-0"), "a", "b"),
        (b, public_of(a), SCOPE, "b", "a"),
        (b, public_of(a), SCOPE, "a", "c"),
    ]
    for secret, public, scope, sender, receiver in wrong:
        with pytest.raises(WireError, match="damaged, or not its"):
            unseal(sealed, secret, public, scope, sender=sender, receiver=receiver)


def test_a_pair_has_one_stream_and_every_purpose_another():
    a, b = new_secret(), new_secret()
    mine = pair_stream(a, public_of(b), SCOPE, ("a", "b"))(64)
    assert mine == pair_stream(b, public_of(a), SCOPE, ("b", "a"))(64)
    others = [
        pair_stream(a, public_of(b), Scope("job", "1-4"), ("a", "b"))(64),
        pair_stream(a, public_of(b), Scope("job2", "1-0"), ("a", "b"))(64),
        pair_stream(a, public_of(b), SCOPE, ("a", "c"))(64),
        own_stream(agree(a, public_of(b)), SCOPE, "a")(64),
    ]
    assert len({mine, *others}) == 5


def test_nobody_loads_the_library_before_there_is_a_mask():
    code = (
        "import sys, fleetune.device_runtime.agent.agent, fleetune.broker.service.service, fleetune.broker.laws\n"
        "sys.exit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# Graph


@pytest.mark.parametrize(("size", "asked"), [(3, 0), (10, 0), (10, 4), (11, 5), (200, 0), (1000, 100)])
def test_neighbours_are_each_others_and_as_many_for_all(size, asked):
    degree = degree_of(size, asked)
    around = [set(neighbours(place, size, degree)) for place in range(size)]
    assert all(len(found) == degree and place not in found for place, found in enumerate(around))
    assert all(place in around[other] for place, found in enumerate(around) for other in found)
    assert degree_of(10, 0) == 9
    assert degree_of(1000, 0) == 128
    assert degree_of(11, 5) == 4


def test_a_threshold_is_always_more_than_half_of_the_holders():
    for degree in range(2, 200):
        for share in (0.501, 0.6, 2 / 3, 1.0):
            threshold = threshold_of(degree, share)
            assert degree + 1 < 2 * threshold <= 2 * (degree + 1)
    assert (threshold_of(2, 2 / 3), threshold_of(9, 0.6), threshold_of(128, 0.6)) == (2, 6, 78)


# Grid


def test_numbers_on_the_grid_worked_by_hand():
    """8 bits of a range of 1 are steps of 1/128; a weight of 3 multiplies; minus one is 2**16 - 1 modulo 2**16."""
    assert modulus_bits(GRID) == 8 + 4 + 4
    values = {"w": np.array([[0.25, -1 / 128], [9.0, 0]], np.float32), "b": np.array([1.5], np.float32)}
    found = placed(values, REFERENCE, GRID, weight=3, seed=0)
    assert found.numbers.tolist() == [64 * 3, 32 * 3, 2**16 - 3, 127 * 3, 0, 3]
    assert found.num_cut == 1


def test_what_is_packed_is_unpacked_and_as_short_as_it_can_be():
    for bits, weight_bits, summands in ((2, 0, 1), (7, 3, 5), (16, 10, 1000), (24, 20, 100_000)):
        grid = SumGrid(bits=bits, weight_bits=weight_bits, summands=summands, limit=1.0)
        reference = {"w": np.zeros(2**16 + 77, np.float32)}
        numbers = np.random.default_rng(0).integers(0, 2 ** modulus_bits(grid), 2**16 + 78, dtype=np.uint64)
        payload = write_numbers(numbers, grid)
        assert len(payload) == payload_bytes(reference, grid) == -(-(2**16 + 78) * modulus_bits(grid) // 8)
        assert (read_numbers(payload, reference, grid) == numbers).all()
        with pytest.raises(WireError, match="masked update of"):
            read_numbers(payload + b"\0", reference, grid)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**20))
def test_the_mean_of_a_sum_is_the_weighted_mean_of_its_numbers(num_devices, seed):
    rng = np.random.default_rng(seed)
    total, expected, weights = np.zeros(6, np.uint64), np.zeros(5), 0
    for device in range(num_devices):
        weight = int(rng.integers(1, 16))
        values = {n: (r + rng.uniform(-1.2, 1.2, r.shape)).astype(np.float32) for n, r in REFERENCE.items()}
        numbers = placed(values, REFERENCE, GRID, weight=weight, seed=device).numbers
        alone = mean_change(numbers, REFERENCE, GRID, num_devices=1)
        expected += weight * np.concatenate([alone[n].reshape(-1) for n in sorted(alone)])
        weights += weight
        added(total, numbers, GRID)
    mean = mean_change(total, REFERENCE, GRID, num_devices=num_devices)
    flat = np.concatenate([mean[name].reshape(-1) for name in sorted(mean)])
    np.testing.assert_allclose(flat, expected / weights, rtol=1e-12, atol=1e-15)


def test_rounding_is_right_on_average_and_no_further_off_than_a_step():
    reference = {"w": np.zeros(200_000, np.float32)}
    values = {"w": np.full(200_000, 0.3 / 128, np.float32)}
    numbers = placed(values, reference, GRID, weight=1, seed=5).numbers[:-1]
    assert set(numbers.tolist()) == {0, 1}
    assert abs(numbers.mean() - 0.3) < 0.005
    assert placed(values, reference, GRID, weight=1, seed=5).numbers[:-1].tolist() == numbers.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_packed(bad):
    values = {"w": np.array([[0, 0], [bad, 0]], np.float32)}
    with pytest.raises(WireError, match="w: not finite"):
        placed(values, REFERENCE, GRID, weight=1, seed=0)


def test_strange_tensors_are_not_packed_and_the_largest_float_is_cut():
    with pytest.raises(WireError, match=r"v: not in the reference; w: shape \[3\]"):
        placed(
            {"w": np.zeros(3, np.float32), "v": np.zeros(1, np.float32)}, REFERENCE, GRID, weight=1, seed=0
        )
    largest = {"w": np.full((2, 2), 3e38, np.float32)}
    assert placed(largest, REFERENCE, GRID, weight=15, seed=0).numbers[1:5].tolist() == [127 * 15] * 4


def test_weights_are_capped_by_their_bits():
    assert [weight_of(GRID, n) for n in (0, 1, 14, 15, 16, 2**31 - 1)] == [1, 1, 14, 15, 15, 15]
    assert weight_of(SumGrid(bits=8, summands=1, limit=1.0), 500) == 1


@pytest.mark.parametrize(
    "grid",
    [
        SumGrid(),
        SumGrid(bits=1, summands=3, limit=1.0),
        SumGrid(bits=8, summands=0, limit=1.0),
        SumGrid(bits=8, summands=3, limit=0.0),
        SumGrid(bits=24, weight_bits=20, summands=2**20, limit=1.0),
    ],
)
def test_a_grid_without_bits_devices_or_range_is_refused(grid):
    with pytest.raises(ConfigError, match="expected 2 bits or more"):
        modulus_bits(grid)


def test_a_sum_that_these_devices_cannot_have_is_refused():
    for weight in (0, 16, 2**15):
        with pytest.raises(WireError, match=f"a weight of {weight} of 1 devices"):
            check_numbers(np.array([0, 0, 0, 0, 0, weight], np.uint64), GRID)
    with pytest.raises(WireError, match="beyond the range"):
        check_numbers(np.array([0, 0, 128, 0, 0, 1], np.uint64), GRID)
    garbage = np.random.default_rng(0).integers(0, 2**16, 6, dtype=np.uint64)
    with pytest.raises(WireError, match="implausible sum"):
        mean_change(garbage, REFERENCE, GRID, num_devices=10)


# Masks


def group_of(count, secrets):
    return tuple(
        MaskPeer(place=i, device_id=f"d{i}", mask_key=public_of(secrets[i]), share_key=bytes(32))
        for i in range(count)
    )


@pytest.mark.parametrize(("count", "degree"), [(3, 2), (6, 5), (9, 4)])
def test_masks_cancel_in_the_sum_whoever_drops_out(count, degree):
    rng = np.random.default_rng(count)
    secrets, seeds = [new_secret() for _ in range(count)], [new_seed() for _ in range(count)]
    members = group_of(count, secrets)
    numbers = [rng.integers(0, 2**16, 6, dtype=np.uint64) for _ in range(count)]
    masked = []
    for i in range(count):
        masked.append(numbers[i].copy())
        peers = [members[j] for j in neighbours(i, count, degree)]
        mask(masked[i], Masker(SCOPE, f"d{i}", i, secrets[i], seeds[i]), peers, GRID)
        assert not np.array_equal(masked[i], numbers[i])
    for num_gone in (0, 1, count - 2):
        gone = set(rng.permutation(count)[:num_gone].tolist())
        there = tuple(i for i in range(count) if i not in gone)
        total, expected = np.zeros(6, np.uint64), np.zeros(6, np.uint64)
        for i in there:
            added(total, masked[i], GRID)
            added(expected, numbers[i], GRID)
        found = Unmasking(
            SCOPE, members, degree, there, {i: seeds[i] for i in there}, {i: secrets[i] for i in gone}
        )
        unmask(total, found, GRID)
        assert (total == expected).all()


def test_a_masked_update_is_uniform_whatever_is_in_it():
    """Chi-square of 16 classes over 40,000 numbers of a constant: 15 expected, 5.5 is its deviation, 60 is far out."""
    reference = {"w": np.zeros(40_000, np.float32)}
    secrets = [new_secret() for _ in range(3)]
    numbers = placed({}, reference, GRID, weight=1, seed=0).numbers
    assert num_elements(reference) == numbers.size
    mask(numbers, Masker(SCOPE, "d0", 0, secrets[0], new_seed()), group_of(3, secrets)[1:], GRID)
    for shift in (0, 4, 8, 12):
        counts = np.bincount((numbers >> np.uint64(shift)).astype(np.int64) & 15, minlength=16)
        expected = numbers.size / 16
        assert ((counts - expected) ** 2 / expected).sum() < 60
    assert abs(np.corrcoef(numbers[:-1].astype(float), numbers[1:].astype(float))[0, 1]) < 0.03
