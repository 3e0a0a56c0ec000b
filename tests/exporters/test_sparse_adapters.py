"""PEFT adapters that leave layers, or the head, with nothing to train: exported, they are torch's under every plan."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from anywhere import ORT_PYTHON, selfcheck_anywhere
from architectures import CAUSAL, SEQUENCE, errors_at_sizes, export_folder, save_tiny, torch_program
from hugging_face import errors_against_peft

from fleetune.device_runtime.arrays import load_arrays
from fleetune.device_runtime.commands.selfcheck import LIMIT, recorded_adapter
from fleetune.device_runtime.contracts.artifact import GOLDEN, Artifact, open_artifact
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ExportError
from fleetune.device_runtime.training.trainer import Trainer
from fleetune.exporters.ort_training.writing import PYTHON
from fleetune.toolkit.tasks import TASKS

pytestmark = pytest.mark.slow
BERT, GPT2 = ("bert", SEQUENCE), ("gpt2", CAUSAL)
LAST, FIRST_NO_HEAD, HEAD, NO_HEAD, EXPRESSION = (
    {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "layers_to_transform": [3]},
    {"target_modules": ["query"], "layers_to_transform": [0]},
    {"target_modules": ["classifier"]},
    {"target_modules": ["query", "value"]},
    {"task_type": "CAUSAL_LM", "target_modules": r".*\.h\.(1|2)\.attn\.c_attn", "fan_in_fan_out": True},
)


@pytest.mark.parametrize("backend", ["onnx", "executorch"])
@pytest.mark.parametrize(
    ("subject", "settings", "learning"),
    [
        (BERT, LAST, {3}),
        (BERT, FIRST_NO_HEAD, {0}),
        (BERT, HEAD, set()),
        (GPT2, EXPRESSION, {1, 2}),
    ],
    ids=["last layer and head", "first layer alone", "head alone", "two layers by an expression"],
)
def test_layers_without_an_adapter_train_nothing(
    tmp_path: Path, subject: tuple[str, str], settings: dict[str, Any], learning: set[int], backend: str
) -> None:
    artifact = exported(tmp_path, subject, settings, backend)
    assert artifact.manifest.learning == learning
    assert_equals_torch(artifact, subject[1])
    for policy in ("suffix", "exact-k", "bernoulli", "cyclic", "dropbp", "coto"):
        moved = trained(artifact, policy)
        layers = {row.layer for row in artifact.manifest.trainable if row.name in moved}
        assert layers <= learning | {-1}, policy


@pytest.mark.skipif(not ORT_PYTHON.is_file(), reason="no .venv-ort; make it with `make ort-env`")
@pytest.mark.parametrize("settings", [HEAD, NO_HEAD], ids=["head alone", "every layer, no head"])
def test_whole_models_train_the_head_alone_or_not_at_all(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert_equals_torch(exported(tmp_path, BERT, settings, "ort-training"), SEQUENCE)


def test_whole_models_with_an_adapter_on_some_layers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)  # refused before anything is made there
    with pytest.raises(ExportError, match=r"has 2 kinds of block.*use --backend onnx"):
        exported(tmp_path, BERT, LAST, "ort-training")


def exported(folder: Path, subject: tuple[str, str], settings: dict[str, Any], backend: str) -> Artifact:
    """A tiny model with an adapter of random numbers, as PEFT saves one."""
    name, task = subject
    model, given = save_tiny(name, task, folder / "model"), folder / "given"
    plain = getattr(transformers, TASKS[task].auto_class).from_pretrained(model)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **settings)
    peft.get_peft_model(plain, config).save_pretrained(given)
    return open_artifact(export_folder(model, task, folder / "artifact", adapter=given, backend=backend))


def assert_equals_torch(artifact: Artifact, task: str) -> None:
    folder, model = artifact.folder, artifact.folder.parent / "model"
    adapter = recorded_adapter(artifact, load_arrays(folder / GOLDEN))
    errors = errors_at_sizes(folder, torch_program(model, task, adapter=folder.parent / "given"))
    errors |= errors_against_peft(artifact, adapter, model)
    assert max(selfcheck_anywhere(folder), *errors.values()) <= LIMIT, errors


def trained(artifact: Any, policy: str) -> set[str]:
    """The tensors that six steps under a policy have changed."""
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(5, 100, (8, 6)), rng.integers(0, 3, 8)
    columns = {row.name: Dense(np.ones((8, 6), np.int64)) for row in artifact.manifest.features}
    columns |= {"input_ids": Dense(ids), "labels": Dense(labels if artifact.manifest.labels else ids)}
    data = make_dataset(columns, np.full(8, 6), seq_len=6, num_classes=3, label_name="labels")
    spec = PolicySpec(name=policy, drop=0.5, **({"period": 1} if policy == "cyclic" else {}))
    work = LocalWork(steps=6, batch_size=4, policy=spec, optimizer=OptimizerSpec(name="adamw", clip_norm=1.0))
    start = artifact.adapter()
    with open_engine(artifact, threads=1) as engine:
        trainer = Trainer(engine, data, work, start)
        while not trainer.done:
            assert np.isfinite(trainer.step().loss)
    return {n for n, array in trainer.adapter.items() if not np.array_equal(array, start[n])}
