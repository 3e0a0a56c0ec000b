"""The laws of small files, on disk and in memory."""

import os

import pytest

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import DiskFiles, MemoryFiles, give_usual_modes


@pytest.fixture(params=["disk", "memory"])
def again(request, tmp_path):
    """Open the files as a device does at each start."""
    kept = MemoryFiles()
    return lambda: DiskFiles(tmp_path / "state") if request.param == "disk" else kept


def test_a_file_is_replaced_listed_and_deleted(again):
    assert (again().names(), again().read("a")) == ([], None)
    again().write("b", b"1")
    again().write("a", b"")
    again().write("b", b"22")
    assert (again().names(), again().read("a"), again().read("b")) == (["a", "b"], b"", b"22")
    again().delete("b")
    again().delete("b")
    assert (again().names(), again().read("b")) == (["a"], None)


def test_others_write_and_read_files_by_their_paths(again):
    assert again().load("a", lambda path: pytest.fail("there is none")) is False
    again().save("a", lambda path: write_atomically(path, b"content"))
    read = []
    assert again().load("a", lambda path: read.append(path.read_bytes())) is True
    assert (read, again().read("a"), again().names()) == ([b"content"], b"content", ["a"])


def test_what_a_reader_raises_passes_and_what_a_writer_raises_leaves_the_old_file(again):
    again().write("a", b"old")

    def fail(path):
        raise KeyError(path.name)

    with pytest.raises(KeyError, match="a"):
        again().load("a", fail)
    with pytest.raises(KeyError, match="a"):
        again().save("a", fail)
    assert (again().names(), again().read("a")) == (["a"], b"old")


def test_memory_holds_no_file_open():
    def num_open():
        return len(os.listdir("/proc/self/fd"))

    before, kept = num_open(), [MemoryFiles() for _ in range(50)]
    for files in kept:
        files.write("a", b"x")
        files.save("b", lambda path: path.write_bytes(b"y"))
        files.load("b", lambda path: path.read_bytes())
    assert num_open() == before


def test_a_file_is_synced_before_it_takes_its_place_and_its_folder_after(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def watched(handle):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".")[-1])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replaced") or replace(*paths))
    DiskFiles(tmp_path / "state").write("a", b"x")
    assert done == ["part", "replaced", "state"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match="state: cannot be written: Not a directory"):
        DiskFiles(tmp_path / "file" / "state")
    files = DiskFiles(tmp_path / "state")
    (tmp_path / "state").rmdir()
    with pytest.raises(StateError, match="state: cannot be written: No such file"):
        files.write("a", b"x")


def test_what_a_killed_writer_left_goes_at_the_next_start(tmp_path):
    for name in (".a.part", ".work-x.4242.part"):  # the second as 0.1.0 named them
        (tmp_path / name).write_bytes(b"half")
    assert DiskFiles(tmp_path).names() == []


def test_a_disk_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    files = DiskFiles(tmp_path / "state")
    files.write("a", b"x")

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_bytes", fail)
    with pytest.raises(StateError, match="state: cannot be read: Input/output error"):
        files.read("a")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_that_a_library_closed_get_the_mode_of_any_other(tmp_path, umask, mode):
    (tmp_path / "closed").touch(mode=0o600)
    before = os.umask(umask)
    try:
        give_usual_modes(tmp_path)
        assert os.umask(umask) == umask, "it is left as it was"
    finally:
        os.umask(before)
    assert (tmp_path / "closed").stat().st_mode & 0o777 == mode
