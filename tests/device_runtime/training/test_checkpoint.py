import json

import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.arrays import save_arrays
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.training.checkpoint import Checkpoint, Origin, load_checkpoint, save_checkpoint

ORIGIN = Origin("a" * 64, "d" * 64, "s" * 64, LocalWork(optimizer=OptimizerSpec(lr=0.1)))
CHECKPOINT = Checkpoint(
    origin=ORIGIN,
    step=3,
    policy_state={"arm": [0.5, "uniform"]},
    adapter={"layer.0.a": np.arange(6, dtype=np.float32).reshape(2, 3)},
    optimizer={"step": np.array([3]), "m/layer.0.a": np.ones((2, 3), np.float32)},
    history={"loss": np.array([1.1, 0.1 + 0.2, 3.0])},
    importance={"norms": np.array([0.1, 0.0]), "steps": np.array([3, 0])},
)


def test_everything_comes_back_to_the_bit(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    found = load_checkpoint(path, ORIGIN)
    assert found[:3] == CHECKPOINT[:3]
    for part in ("adapter", "optimizer", "history", "importance"):
        want, got = getattr(CHECKPOINT, part), getattr(found, part)
        assert want.keys() == got.keys()
        assert all(np.array_equal(want[n], got[n]) and want[n].dtype == got[n].dtype for n in want)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_every_difference_of_the_runs_is_named(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    other = Origin("b" * 64, "d" * 64, "s" * 64, LocalWork(optimizer=OptimizerSpec(lr=0.2), steps=9))
    with pytest.raises(
        ConfigError,
        match=r"artifact: aaaaaaaaaaaa there, bbbbbbbbbbbb here; optimizer\.lr: \S+ there, 0\.2 here; steps: 0 there, 9 here",
    ):
        load_checkpoint(path, other)


def test_a_checkpoint_of_before_head_starts_is_of_a_run_without():
    said = json.loads(msgspec.json.encode(ORIGIN))
    del said["head_start"], said["work"]["learns"]
    assert msgspec.json.decode(json.dumps(said), type=Origin) == ORIGIN


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    whole = path.read_bytes()
    save_arrays(tmp_path / "foreign.safetensors", CHECKPOINT.adapter)
    for content in (b"", whole[:100], whole[:-4], (tmp_path / "foreign.safetensors").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(StateError, match=r"c\.safetensors: .*delete it to start anew"):
            load_checkpoint(path, ORIGIN)
    with pytest.raises(StateError, match="absent"):
        load_checkpoint(tmp_path / "absent", ORIGIN)


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    content = path.read_bytes()
    changed = content.replace(rb"{\"format\":2,", rb"{\"format\":1,")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(
        StateError, match="checkpoint format 1, this version reads 2; delete it to start anew"
    ):
        load_checkpoint(path, ORIGIN)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, CHECKPOINT)
    whole = path.read_bytes()
    for place in (len(whole) - 1, len(whole) - 40, whole.index(b'step\\":3') + 7):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(StateError, match="a damaged checkpoint: its checksum differs; delete it"):
            load_checkpoint(path, ORIGIN)


def test_a_checkpoint_of_before_the_checksum_opens(tmp_path):
    path = tmp_path / "c.safetensors"
    header = {"format": 2, "origin": msgspec.to_builtins(ORIGIN), "step": 3, "policy_state": {}}
    arrays = {f"adapter.{name}": array for name, array in CHECKPOINT.adapter.items()}
    save_arrays(path, arrays, metadata={"fleetune.checkpoint": json.dumps(header)})
    assert load_checkpoint(path, ORIGIN).step == 3
    save_arrays(path, arrays, metadata={"fleetune.checkpoint": json.dumps(header | {"step": -1})})
    with pytest.raises(StateError, match=r"not a checkpoint: .* at `\$\.step`; delete it"):
        load_checkpoint(path, ORIGIN)


def test_a_checkpoint_is_its_owners_alone(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, CHECKPOINT)
    assert path.stat().st_mode & 0o777 == 0o600
