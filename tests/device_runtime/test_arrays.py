import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fleetune.device_runtime import arrays
from fleetune.device_runtime.errors import ArtifactError


def test_a_file_is_synced_before_it_takes_the_place_of_the_old_and_its_folder_after(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    seen = []

    def spy(handle, fsync=os.fsync):
        seen.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, path.read_bytes()))
        fsync(handle)

    monkeypatch.setattr(arrays.os, "fsync", spy)
    arrays.write_atomically(path, b"new")
    assert seen == [(".kept.part", b"old"), (tmp_path.name, b"new")]


def test_what_a_killed_writer_left_is_in_nobodys_way(tmp_path):
    path = tmp_path / "kept"
    (tmp_path / ".kept.part").write_bytes(b"half of something longer")
    arrays.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("kept", b"new")]


def test_a_disk_that_is_full_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "kept"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrays.os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        arrays.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("kept", b"old")]


def one_tensor(dtype, data, shape):
    header = json.dumps({"t": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return len(header).to_bytes(8, "little") + header + data


BITS = {
    0x3F80: 1.0,
    0xC048: -3.125,
    0x0000: 0.0,
    0x8000: -0.0,
    0x7F80: np.inf,
    0x0001: 2.0**-133,
    0x4049: 3.140625,
}


def test_bfloat16_is_read_without_a_library_for_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    content = np.array(list(BITS), "<u2").tobytes()
    found = arrays.parse_arrays(one_tensor("BF16", content, [len(BITS)]))["t"]
    assert found.dtype == np.float32
    assert (
        found.view(np.uint32).tolist() == np.array(list(BITS.values()), np.float32).view(np.uint32).tolist()
    )
    assert arrays.parse_arrays(one_tensor("BF16", content[:2], []))["t"].shape == ()


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E4M3", "C64"])
def test_a_dtype_that_is_not_read_is_named(tmp_path, dtype):
    size = 8 if dtype == "C64" else 1
    (tmp_path / "a").write_bytes(one_tensor(dtype, bytes(size), [1]))
    with pytest.raises(
        ArtifactError, match=rf"a: cannot be read as safetensors: t is {dtype}; read are BOOL, .*BF16"
    ):
        arrays.load_arrays(tmp_path / "a")


def test_a_shape_that_no_array_can_have_is_one_line():
    with pytest.raises(ArtifactError, match=r"not a safetensors file|a shape that no array can have"):
        arrays.parse_arrays(one_tensor("F32", b"", [0, 2**63]))


def test_what_is_read_can_be_written_to():
    found = arrays.parse_arrays(arrays.to_bytes({"a": np.zeros(3, np.float32)}))["a"]
    found += 1
    assert found.tolist() == [1, 1, 1]


def test_arrays_come_in_the_order_of_the_file(tmp_path):
    names = [f"t{i * 7 % 40:02}" for i in range(40)]
    rows = {name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, name in enumerate(names)}
    header = json.dumps({"__metadata__": {"a": "b"}, **dict(sorted(rows.items()))}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(range(40))
    (tmp_path / "a").write_bytes(content)
    assert list(load_file(tmp_path / "a")) == names
    for _ in range(5):
        found = arrays.parse_arrays(content)
        assert list(found) == names
        assert [int(array[0]) for array in found.values()] == list(range(40))


def test_bits_are_compared_and_not_numbers():
    nan, whole = np.float32([np.nan, 1]), np.arange(12, dtype=np.float32).reshape(3, 4)
    assert arrays.same_bits(nan, nan.copy())
    assert arrays.same_bits(whole[:, ::2], whole[:, ::2].copy())
    assert not arrays.same_bits(np.float32([0.0]), np.float32([-0.0]))
    assert not arrays.same_bits(np.zeros(2, np.float32), np.zeros(3, np.float32))
    assert not arrays.same_bits(np.zeros(2, np.float32), np.zeros(2, np.int32))
