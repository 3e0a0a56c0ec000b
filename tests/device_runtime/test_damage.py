"""Whatever is on the disk: a reader gives what it promises, or one of our errors."""

import contextlib
import copy
import json
import random
import shutil
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from words import write_lines

from fleetune.device_runtime.arrays import load_arrays, parse_arrays, save_arrays, to_bytes
from fleetune.device_runtime.commands.inspect import inspect
from fleetune.device_runtime.contracts.adapters import load_peft, save_peft
from fleetune.device_runtime.contracts.artifact import MANIFEST, open_artifact
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import FleetuneError, StateError
from fleetune.device_runtime.training.trainer import Trainer

few = settings(max_examples=150, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 2**32 - 1)
STRANGE = (
    None, True, -1, 0, 1, 3.5, 2**31, 2**63 - 1, 2**63, -(2**64), 1e308, "", "job", "V9", "S", "float16", "int8",
    "batch", "labels", "\0", "\ud800", "../x", "x" * 300, [], {}, [0, 2**63], [2**62, 2**62], [-1], [[]],
)  # fmt: skip


@pytest.fixture(scope="module")
def artifact(word_artifact):
    return open_artifact(word_artifact)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@contextlib.contextmanager
def ours():
    with contextlib.suppress(FleetuneError), np.errstate(all="ignore"):
        yield


def damaged(content, draw):
    """Some bytes of ``content`` changed, cut out, doubled, or its end lost."""
    content = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(content) + 1)
        other = draw.randbytes(draw.choice((1, 1, 1, 2, 8)))
        kind = draw.randrange(4)
        if kind == 0:
            content[place : place + len(other)] = other
        elif kind == 1:
            content[place:place] = other
        elif kind == 2:
            del content[place : place + len(other)]
        elif draw.random() < 0.3:
            del content[place:]
    return bytes(content)


def changed(tree, draw):
    """A value somewhere in a tree of JSON replaced, removed, or put beside itself."""
    at = tree
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return tree
        key = draw.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.85:
            at = at[key]
            continue
        kind = draw.randrange(6)
        if kind == 0:
            del at[key]
        elif kind == 1 and isinstance(at, list):
            at.append(copy.deepcopy(at[key]))
        else:
            at[key] = copy.deepcopy(draw.choice(STRANGE))
        return tree


def strange_array(draw, array):
    """Something in the place of an array."""
    dtype = draw.choice((array.dtype, np.float16, np.float64, np.int64, np.int8, np.uint64, np.bool_))
    shape = draw.choice((array.shape, array.shape[:-1], (0, *array.shape[1:]), (*array.shape, 1), (), (1,)))
    value = draw.choice((0, 1, -1, 127, 69))
    return np.full(shape, value).astype(dtype)


@few
@given(seeds)
def test_a_damaged_manifest(artifact, folder, seed):
    draw = random.Random(seed)
    twin = folder / "artifact"
    if not twin.exists():
        shutil.copytree(artifact.folder, twin)
    whole = (artifact.folder / MANIFEST).read_bytes()
    if draw.random() < 0.2:
        content = damaged(whole, draw)
    else:
        tree = json.loads(whole)
        for _ in range(draw.randint(1, 3)):
            tree = changed(tree, draw)
        content = json.dumps(tree).encode()
    (twin / MANIFEST).write_bytes(content)
    with ours():
        found = open_artifact(twin, verify=False)
        for tensor in found.manifest.tensors:
            if tensor.file == "base":
                found.base(tensor)
        found.adapter()


@few
@given(seeds)
def test_a_damaged_data_file_of_lines(artifact, folder, seed):
    draw = random.Random(seed)
    rows = [
        {"text": "turn on", "label": draw.choice((0, "a", "1", 1.0, True, None, 9, "01", 10**30, []))}
        for _ in range(3)
    ]
    rows = [changed(row, draw) if draw.random() < 0.3 else row for row in rows]
    lines = "".join(json.dumps(row) + draw.choice(("\n", "\r\n", "\n\n")) for row in rows)
    cells = "text,label\n" + "".join(f'"turn, on",{draw.choice(("a", "0", " b", "1.0", ""))}\n' for _ in rows)
    for name, content in (("a.jsonl", lines), ("a.csv", cells)):
        wide = content.encode(draw.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1")))
        (folder / name).write_bytes(wide if draw.random() < 0.3 else damaged(wide, draw))
        with ours():
            found = load_dataset(folder / name, artifact.manifest, artifact.folder, seq_len=16)
            assert ((found.labels >= 0) & (found.labels < 5)).all()


@few
@given(seeds)
def test_a_damaged_npz(artifact, folder, seed):
    draw = random.Random(seed)
    path = folder / "a.npz"
    arrays = {
        "input_ids": np.ones((4, 6), np.int64),
        "attention_mask": np.ones((4, 6), np.int64),
        "labels": np.arange(4) % 3,
    }
    if draw.random() < 0.5:
        name = draw.choice(list(arrays))
        arrays[name] = strange_array(draw, arrays[name])
    (np.savez_compressed if draw.random() < 0.5 else np.savez)(path, **arrays)
    if draw.random() < 0.2:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(
                draw.choice(("readme", "x.npy")), damaged(b"\x93NUMPY\x01\x00v\x00{'descr'", draw)
            )
    elif draw.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), draw))
    with ours():
        found = load_dataset(path, artifact.manifest, artifact.folder, seq_len=16)
        assert ((found.labels >= 0) & (found.labels < 5)).all()


@few
@given(seeds)
def test_a_damaged_adapter(artifact, folder, seed):
    draw = random.Random(seed)
    peft = folder / "peft"
    arrays = artifact.adapter()
    save_peft(peft, artifact.manifest, arrays)
    if draw.random() < 0.5:
        name = draw.choice(list(arrays))
        arrays[name] = strange_array(draw, arrays[name])
        save_arrays(peft / "adapter_model.safetensors", arrays)
    else:
        path = peft / draw.choice(("adapter_model.safetensors", "adapter_config.json"))
        content = path.read_bytes()
        head = content[: draw.choice((200, len(content)))]  # where names, dtypes and offsets are
        path.write_bytes(damaged(head, draw) + content[len(head) :])
    with ours():
        found = load_peft(peft, artifact.manifest)
        assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in found.values())


def retold(content, draw, dtype):
    """A safetensors file whose header says something else."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["a"]["dtype"] = dtype
    said = json.dumps(changed(header, draw)).encode()
    return len(said).to_bytes(8, "little") + said + content[8 + size :]


@few
@given(seeds)
def test_a_safetensors_file_whose_header_lies(seed):
    draw = random.Random(seed)
    content = to_bytes({"a": np.ones((2, 3), np.float32), "b": np.zeros(4, np.int64)})
    for dtype in ("F8_E5M2", "F8_E4M3", "BF16", "F4", "C64", "U16", "F16", "F32"):
        with ours():
            parse_arrays(retold(content, draw, dtype))


@pytest.fixture(scope="module")
def trainer_of(artifact, folder):
    data = load_dataset(write_lines(folder / "w.csv"), artifact.manifest, artifact.folder, seq_len=8)
    work = LocalWork(steps=4, batch_size=4, optimizer=OptimizerSpec(proximal=0.1))
    with open_engine(artifact, threads=1) as engine:
        yield lambda: Trainer(engine, data, work, artifact.adapter())


@settings(few, max_examples=100)
@given(seeds)
def test_a_damaged_checkpoint(trainer_of, folder, seed):
    draw = random.Random(seed)
    path = folder / "checkpoint.safetensors"
    whole = folder / "whole.safetensors"
    if not whole.exists():
        trainer = trainer_of()
        trainer.step()
        trainer.step()
        trainer.save(whole)
    content = whole.read_bytes()
    if draw.random() < 0.3:
        path.write_bytes(damaged(content, draw))
    else:
        size = int.from_bytes(content[:8], "little")
        said = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["fleetune.checkpoint"])
        if draw.random() < 0.8:
            del said["sha256"]  # as releases wrote it that knew no checksum
        arrays = load_arrays(whole)
        if draw.random() < 0.5:
            said = changed(said, draw)
        else:
            name = draw.choice(sorted(arrays))
            arrays[draw.choice((name, "optimizer.x"))] = strange_array(draw, arrays[name])
            if draw.random() < 0.5:
                del arrays[name]
        save_arrays(path, arrays, metadata={"fleetune.checkpoint": json.dumps(said)})
    trainer = trainer_of()
    with ours():
        try:
            trainer.restore(path)
        except StateError:
            assert trainer.step_index == 0
        while not trainer.done:
            trainer.step()


def test_what_is_not_damaged_is_read(artifact, folder, trainer_of):
    """The tests above would pass if nothing could be read at all."""
    (folder / "a.jsonl").write_text('{"text": "turn on", "label": "b"}\n')
    assert load_dataset(
        folder / "a.jsonl", artifact.manifest, artifact.folder, seq_len=16
    ).labels.tolist() == [1]
    save_peft(folder / "peft", artifact.manifest, artifact.adapter())
    assert load_peft(folder / "peft", artifact.manifest).keys() == artifact.adapter().keys()
    trainer, again = trainer_of(), trainer_of()
    trainer.step()
    trainer.save(folder / "c.safetensors")
    again.restore(folder / "c.safetensors")
    assert again.step_index == 1
    assert inspect(artifact.folder).num_layers == 4
