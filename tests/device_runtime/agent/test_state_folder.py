from hashlib import sha256

import numpy as np
import pytest

from fleetune.device_runtime.agent.files import DiskFiles, MemoryFiles
from fleetune.device_runtime.agent.state_folder import StateFolder
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import ArtifactError


@pytest.fixture(params=["disk", "memory"])
def files(request, tmp_path):
    return DiskFiles(tmp_path) if request.param == "disk" else MemoryFiles()


@pytest.fixture
def state(files):
    return StateFolder(files)


def residual(value):
    return {"w": np.full(3, value, np.float64)}


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
    state.keep_residual(1, residual(1.0))
    state.forget_checkpoints(but="two")
    assert files.names() == ["residual-000001.safetensors", "work-two.safetensors"]
    read = []
    assert state.restore("two", lambda path: read.append(path.read_bytes()))
    assert (read, state.restore("one", lambda path: pytest.fail("gone"))) == ([b"two"], False)
    state.forget_checkpoints()
    assert files.names() == ["residual-000001.safetensors"]


def test_a_checkpoint_may_get_another_name(state, files):
    state.keep_checkpoint("old", lambda path: write_atomically(path, b"x"))
    for _ in range(2):
        state.rename_checkpoint("old", "new")
    assert (files.names(), files.read("work-new.safetensors")) == (["work-new.safetensors"], b"x")


def test_what_is_owed_is_that_of_the_newest_round_before(state):
    for number in (2, 1_000_000, 999_999):
        state.keep_residual(number, residual(number))
    assert state.residual(2) == {}
    for asked, wanted in ((3, 2), (1_000_000, 999_999), (1_000_001, 1_000_000)):
        np.testing.assert_array_equal(state.residual(asked)["w"], residual(wanted)["w"])
    state.keep_residual(999_999, {})
    np.testing.assert_array_equal(state.residual(1_000_000)["w"], residual(2)["w"])


@pytest.mark.parametrize(("accepted", "left"), [(True, ["2"]), (False, ["1"])])
def test_a_verdict_voids_what_it_settles(state, files, accepted, left):
    for number in (1, 2, 3):
        state.keep_residual(number, residual(number))
    state.settle(2, accepted=accepted)
    assert files.names() == [f"residual-00000{number}.safetensors" for number in left]


def test_a_damaged_residual_is_named(state, files):
    files.write("residual-000001.safetensors", b"torn")
    with pytest.raises(ArtifactError, match=r"residual-000001\.safetensors: cannot be read"):
        state.residual(2)
