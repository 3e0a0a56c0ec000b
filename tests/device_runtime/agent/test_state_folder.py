from hashlib import sha256

import pytest

from fleetune.device_runtime.agent.state_folder import StateFolder
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.files import DiskFiles, MemoryFiles


@pytest.fixture(params=["disk", "memory"])
def files(request, tmp_path):
    return DiskFiles(tmp_path) if request.param == "disk" else MemoryFiles()


@pytest.fixture
def state(files):
    return StateFolder(files)


def test_one_adapter_is_kept_and_known_by_its_digest(state):
    for content in (b"old", b"new"):
        state.keep_adapter(content)
    assert state.adapter(sha256(b"new").hexdigest()) == b"new"
    assert state.adapter(sha256(b"old").hexdigest()) is None


def test_an_adapter_that_was_damaged_is_none(state, files):
    state.keep_adapter(b"good")
    files.write("adapter.safetensors", b"bad")
    assert state.adapter(sha256(b"good").hexdigest()) is None


def test_a_checkpoint_is_of_one_work_and_the_others_go(state, files):
    for key in ("one", "two"):
        state.keep_checkpoint(key, lambda path, key=key: write_atomically(path, key.encode()))
    files.write("memory-a-000001.safetensors", b"")
    state.forget_checkpoints(but="two")
    assert files.names() == ["memory-a-000001.safetensors", "work-two.safetensors"]
    read = []
    assert state.restore("two", lambda path: read.append(path.read_bytes()))
    assert (read, state.restore("one", lambda path: pytest.fail("gone"))) == ([b"two"], False)
    state.forget_checkpoints()
    assert files.names() == ["memory-a-000001.safetensors"]


def test_the_newest_adapter_is_that_kept_last(state):
    assert state.newest_adapter() == b""
    for content in (b"old", b"new"):
        state.keep_adapter(content)
    assert state.newest_adapter() == b"new"


def test_a_checkpoint_may_get_another_name(state, files):
    state.keep_checkpoint("old", lambda path: write_atomically(path, b"x"))
    for _ in range(2):
        state.rename_checkpoint(lambda: "old", "new")
    assert (files.names(), files.read("work-new.safetensors")) == (["work-new.safetensors"], b"x")
