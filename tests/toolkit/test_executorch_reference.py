"""The ExecuTorch backend on models that people have: architectures against torch, training curves against the onnx backend."""

from pathlib import Path

import numpy as np
import pytest
from architectures import IMAGE, SEQUENCE, errors_at_sizes, export_tiny, torch_program
from pretrained import MINILM, minilm_artifact, shared_data

from device_runtime.artifact import open_artifact
from device_runtime.data import load_dataset
from device_runtime.selfcheck import selfcheck
from device_runtime.stack import Stack
from device_runtime.trainer import Trainer
from device_runtime.wire import LocalWork, OptimizerSpec, PolicySpec
from toolkit.export import export

pytestmark = pytest.mark.slow
STEPS = 50


@pytest.mark.parametrize(
    ("name", "task"),
    [("bert", SEQUENCE), ("llama", SEQUENCE), ("qwen2", SEQUENCE), ("gpt2", SEQUENCE), ("vit", IMAGE)],
)
def test_an_architecture_equals_torch_at_sizes_that_were_not_traced(
    name: str, task: str, tmp_path: Path
) -> None:
    artifact = export_tiny(name, task, tmp_path, backend="executorch")
    assert selfcheck(artifact).max_relative_error < 1e-4
    errors = errors_at_sizes(artifact, torch_program(tmp_path / "model", task))
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.shared_data
def test_fifty_losses_equal_those_of_the_onnx_backend(tmp_path: Path) -> None:
    data = shared_data("banking77") / "train.jsonl.gz"
    export(
        MINILM,
        task="sequence-classification",
        num_labels=77,
        out=tmp_path / "artifact",
        backend="executorch",
    )
    found = {}
    for backend, folder in (("executorch", tmp_path / "artifact"), ("onnx", minilm_artifact(77))):
        artifact = open_artifact(folder)
        assert artifact.manifest.backend == backend
        found[backend] = losses(folder, data)
    np.testing.assert_allclose(found["executorch"], found["onnx"], atol=1e-2, rtol=0)
    assert np.ptp(found["onnx"]) > 0.1  # fifty different numbers, not fifty times the first


def losses(folder: Path, data: Path) -> list[float]:
    """Half of the layers dropped at each step, from one seed."""
    artifact = open_artifact(folder, verify=False)
    samples = load_dataset(data, artifact.manifest, folder, seq_len=48)
    work = LocalWork(
        policy=PolicySpec(name="exact-k", drop=0.5), optimizer=OptimizerSpec(lr=2e-3), steps=STEPS, batch_size=16, seed=7
    )  # fmt: skip
    with Stack(artifact) as stack:
        trainer = Trainer(stack, samples, work, artifact.adapter())
        return [trainer.step().loss for _ in range(STEPS)]
