"""The ExecuTorch backend on models that people have: architectures against torch, training curves against torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import IMAGE, SEQUENCE, errors_at_sizes, export_tiny, torch_program
from peft_reference import peft_model, torch_losses
from pretrained import MINILM, minilm_artifact, shared_data

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import LayerPlan
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.training.trainer import Trainer
from fleetune.toolkit.export import export

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
def test_fifty_losses_equal_torch_and_the_onnx_backend(tmp_path: Path) -> None:
    data = shared_data("banking77") / "train.jsonl.gz"
    folder = tmp_path / "artifact"
    export(MINILM, task="sequence-classification", num_labels=77, out=folder, backend="executorch")
    found, batches, plans = losses(folder, data)
    artifact = open_artifact(folder)
    assert artifact.manifest.backend == "executorch"
    save_peft(tmp_path / "start", artifact.manifest, artifact.adapter())
    expected = torch_losses(peft_model(tmp_path / "start", trainable=True), batches, plans)
    np.testing.assert_allclose(found, expected, atol=1e-2, rtol=0)
    np.testing.assert_allclose(found, losses(minilm_artifact(77), data)[0], atol=1e-2, rtol=0)
    assert np.ptp(found) > 0.1  # fifty different numbers, not fifty times the first


def losses(folder: Path, data: Path) -> tuple[list[float], list[dict[str, Any]], list[LayerPlan]]:
    """Losses, batches and plans of fifty steps, half of the layers dropped at each, from one seed."""
    artifact = open_artifact(folder, verify=False)
    samples = load_dataset(data, artifact.manifest, folder, seq_len=48)
    work = LocalWork(
        policy=PolicySpec(name="exact-k", drop=0.5), optimizer=OptimizerSpec(lr=2e-3), steps=STEPS, batch_size=16, seed=7
    )  # fmt: skip
    batches, plans = [], []
    with open_engine(artifact) as stack:
        real = stack.step
        stack.step = lambda batch, plan, adapter, **given: (  # type: ignore[method-assign]
            batches.append(batch),
            plans.append(plan),
            real(batch, plan, adapter, **given),
        )[-1]
        trainer = Trainer(stack, samples, work, artifact.adapter())
        return [trainer.step().loss for _ in range(STEPS)], batches, plans
