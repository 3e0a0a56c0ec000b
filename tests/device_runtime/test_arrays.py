import os
from pathlib import Path

import pytest

from fleetune.device_runtime import arrays


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
    with pytest.raises(OSError, match="No space left"):
        arrays.write_atomically(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("kept", b"old")]
