"""Texts that lie in one sequence are to the engine as texts that lie alone."""

import json
from pathlib import Path

import numpy as np
import pytest
from paths import DATA
from tiny import noisy_adapter

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.contracts.texts_apart import holds_apart
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.packing import packed
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.texts_apart import places_of, shut
from fleetune.device_runtime.errors import ConfigError

WRITER = DATA / "tiny_writer"
ROOM = 48


def texts(folder: Path, artifact: Artifact) -> Dataset:
    """Seven texts of some five to thirty tokens."""
    lines = [
        "turn the lamp on",
        "off off",
        "in the hall the lamp is off",
        "bed heater on in bed",
        "put it",
        "the hall",
        "on on on",
    ]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return load_dataset(path, artifact.manifest, artifact.folder, seq_len=ROOM)


def whole(dataset: Dataset) -> Arrays:
    return dataset.rows(np.arange(dataset.num_samples))


@pytest.mark.parametrize(
    ("threads", "memory"), [(1, SAVE_ALL), (2, SAVE_ALL), (1, MemoryPlan(micro_batch=1, saved_layers=1))]
)
def test_a_step_on_packed_texts_is_the_step_on_the_texts_alone(
    tmp_path: Path, threads: int, memory: MemoryPlan
) -> None:
    artifact = open_artifact(WRITER)
    assert holds_apart(artifact.manifest)
    plain = texts(tmp_path, artifact)
    together = packed(plain, apart=True)
    assert together.num_samples < plain.num_samples / 2
    adapter, plan = noisy_adapter(artifact), full(artifact.manifest.num_layers)
    with open_engine(artifact, threads=threads, memory=memory) as engine:
        one, other = (engine.step(whole(data), plan, adapter) for data in (plain, together))
        seeing = engine.step(whole(packed(plain, apart=False)), plan, adapter)
    assert other.loss == pytest.approx(one.loss, abs=2e-6)
    assert abs(seeing.loss - one.loss) > 1e-3
    for name, grad in one.grads.items():
        np.testing.assert_allclose(other.grads[name], grad, atol=1e-5, err_msg=name)


def test_an_artifact_whose_blocks_have_no_mask_refuses_numbered_texts(word_artifact: Path) -> None:
    artifact = open_artifact(word_artifact)
    assert not holds_apart(artifact.manifest)
    batch = {
        "input_ids": np.ones((1, 4), np.int64),
        "attention_mask": np.array([[1, 1, 2, 2]]),
        "labels": np.zeros(1, np.int64),
    }
    with open_engine(artifact) as engine, pytest.raises(ConfigError, match="hold no texts apart"):
        engine.step(batch, full(4), artifact.adapter())


def test_where_the_tokens_of_each_text_are() -> None:
    numbers = np.array([[1, 1, 2, 2, 2, 3, 0], [1, 1, 1, 1, 0, 0, 0]])
    rows, columns, is_token = places_of(numbers)
    assert rows[:, 0].tolist() == [0, 0, 0, 1]
    found = [c[t].tolist() for c, t in zip(columns, is_token, strict=True)]
    assert found == [[0, 1], [2, 3, 4], [5], [0, 1, 2, 3]]


@pytest.mark.parametrize(("dtype", "open_"), [(np.float32, 0.0), (np.float16, 0.0), (np.bool_, True)])
def test_a_mask_is_shut_between_texts_and_as_it_was_elsewhere(dtype: type, open_: float) -> None:
    numbers = np.array([[1, 2, 2, 0]])
    given = np.full((1, 1, 4, 4), open_, dtype)
    found = shut(given, numbers)
    assert found.dtype == given.dtype
    is_open = (found == given)[0, 0].tolist()
    assert is_open == [
        [True, False, False, True],
        [False, True, True, True],
        [False, True, True, True],
        [True] * 4,
    ]
