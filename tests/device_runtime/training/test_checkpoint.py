import numpy as np
import pytest

from fleetune.device_runtime.arrays import save_arrays
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.training.checkpoint import Checkpoint, Origin, load_checkpoint, save_checkpoint

ORIGIN = Origin("a" * 64, "d" * 64, "s" * 64, LocalWork(optimizer=OptimizerSpec(lr=0.1)))
CHECKPOINT = Checkpoint(
    origin=ORIGIN,
    step=3,
    policy_state={"arm": [0.5, "uniform"]},
    adapter={"layer.0.a": np.arange(6, dtype=np.float32).reshape(2, 3)},
    optimizer={"step": np.array([3]), "m/layer.0.a": np.ones((2, 3), np.float32)},
    history={"loss": np.array([1.1, 0.1 + 0.2, 3.0])},
)


def test_everything_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    found = load_checkpoint(path, ORIGIN)
    assert found[:3] == CHECKPOINT[:3]
    for part in ("adapter", "optimizer", "history"):
        want, got = getattr(CHECKPOINT, part), getattr(found, part)
        assert want.keys() == got.keys()
        assert all(np.array_equal(want[n], got[n]) and want[n].dtype == got[n].dtype for n in want)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_every_difference_of_the_runs_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    other = Origin("b" * 64, "d" * 64, "s" * 64, LocalWork(optimizer=OptimizerSpec(lr=0.2), steps=9))
    with pytest.raises(
        ConfigError, match=r"artifact: aaaaaaaaaaaa there, bbbbbbbbbbbb here.*lr.*steps: 0 there, 9 here"
    ):
        load_checkpoint(path, other)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    whole = path.read_bytes()
    save_arrays(tmp_path / "foreign.safetensors", CHECKPOINT.adapter)
    for content in (b"", whole[:100], whole[:-4], (tmp_path / "foreign.safetensors").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"c\.safetensors: .*delete it to start anew"):
            load_checkpoint(path, ORIGIN)
    with pytest.raises(ArtifactError, match="absent"):
        load_checkpoint(tmp_path / "absent", ORIGIN)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    content = path.read_bytes()
    changed = content.replace(rb"{\"format\":2,", rb"{\"format\":1,")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(
        ArtifactError, match="checkpoint format 1, this version reads 2; delete it to start anew"
    ):
        load_checkpoint(path, ORIGIN)
