import numpy as np
import pytest

from fleetune.device_runtime.contracts.masks import filled, mask_bytes, mask_of, masked, read_mask, write_mask
from fleetune.device_runtime.errors import WireError

LIKE = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array(7, np.float32),
    "c": np.ones(3, np.float32),
}
BITS = np.array([1, 0, 1, 0, 0, 0, 1, 0, 0, 0], bool)
"""One of a; elements 1 and 5 of b; none of c."""


def test_bits_go_by_name_and_place_and_lowest_first():
    mask = mask_of(BITS, LIKE)
    assert mask.keys() == {"a", "b"}
    assert mask["b"].tolist() == [[False, True, False], [False, False, True]]
    assert write_mask(mask, LIKE) == bytes([0b01000101, 0])
    assert len(write_mask(mask, LIKE)) == mask_bytes(LIKE) == 2
    again = read_mask(write_mask(mask, LIKE), LIKE)
    assert {n: bits.tolist() for n, bits in again.items()} == {n: bits.tolist() for n, bits in mask.items()}


def test_what_is_cut_by_a_mask_is_put_back_where_it_was():
    mask = mask_of(BITS, LIKE)
    part = masked(LIKE, mask)
    assert {n: value.tolist() for n, value in part.items()} == {"a": [7.0], "b": [1.0, 5.0]}
    moved = filled({n: value + 10 for n, value in part.items()}, LIKE, mask)
    assert moved["b"].tolist() == [[0.0, 11.0, 2.0], [3.0, 4.0, 15.0]]
    assert moved["a"].tolist() == 17.0
    assert "c" not in moved, "nothing of it travelled"
    assert LIKE["b"][0, 1] == 1.0, "nothing is written to"


def test_without_a_mask_all_travels():
    assert masked(LIKE, {}) == LIKE
    assert filled({"c": LIKE["c"]}, LIKE, {}) == {"c": LIKE["c"]}


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x01\x00\x00", b"\x01\x04", b"\x00\x00"])
def test_a_mask_of_another_adapter_or_of_nothing_is_refused(content):
    with pytest.raises(WireError, match="mask"):
        read_mask(content, LIKE)
