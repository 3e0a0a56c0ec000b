"""The device against torch + peft: real pretrained weights, real data, the same seeds and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft_reference import peft_model, set_mode, torch_losses
from pretrained import minilm_artifact, shared_data

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, dropping
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.training.trainer import Trainer

STEPS, SEED, BATCH = 50, 7, 16


@pytest.fixture(scope="module")
def artifact_folder() -> Path:
    return minilm_artifact(77)


def banking(folder: Path, part: str) -> Dataset:
    data = shared_data("banking77") / f"{part}.jsonl.gz"
    return load_dataset(data, open_artifact(folder, verify=False).manifest, folder, seq_len=48)


def test_selfcheck_of_minilm(artifact_folder: Path) -> None:
    report = selfcheck(artifact_folder)
    assert report.ok
    assert report.max_relative_error < 1e-4


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "policy",
    [pytest.param(PolicySpec(), marks=pytest.mark.slow), PolicySpec(name="exact-k", drop=0.5)],
    ids=["full", "half"],
)
def test_fifty_losses_equal_torch_and_peft(artifact_folder: Path, tmp_path: Path, policy: PolicySpec) -> None:
    data, artifact = banking(artifact_folder, "train"), open_artifact(artifact_folder, verify=False)
    save_peft(tmp_path / "start", artifact.manifest, artifact.adapter())
    work = LocalWork(
        policy=policy, optimizer=OptimizerSpec(lr=2e-3), steps=STEPS, batch_size=BATCH, seed=SEED
    )
    plans = []
    with open_engine(artifact) as stack:
        real = stack.step
        stack.step = lambda batch, plan, adapter, **given: (
            plans.append(plan),
            real(batch, plan, adapter, **given),
        )[1]  # type: ignore[method-assign]
        trainer = Trainer(stack, data, work, artifact.adapter())
        losses = [trainer.step().loss for _ in range(STEPS)]
    batches = [data.rows(rows) for rows in data.epoch_batches(SEED, 0, BATCH)[:STEPS]]
    expected = torch_losses(peft_model(tmp_path / "start", trainable=True), batches, plans)
    np.testing.assert_allclose(losses, expected, atol=1e-3, rtol=0)
    assert np.ptp(losses) > 0.1  # fifty different numbers, not fifty times the first


@pytest.mark.shared_data
def test_the_adapter_loads_with_peft_and_predicts_the_same(artifact_folder: Path, tmp_path: Path) -> None:
    data, artifact = banking(artifact_folder, "test"), open_artifact(artifact_folder, verify=False)
    work = LocalWork(policy=PolicySpec(name="exact-k", drop=0.5), steps=10, batch_size=BATCH)
    batch = data.rows(np.arange(8))
    with open_engine(artifact) as stack:
        trainer = Trainer(stack, data, work, artifact.adapter())
        while not trainer.done:
            trainer.step()
        logits = stack.predict(batch, trainer.adapter)
    save_peft(tmp_path / "adapter", artifact.manifest, trainer.adapter)
    model = peft_model(tmp_path / "adapter", trainable=False)
    with torch.no_grad():
        expected = model(**{n: torch.from_numpy(a) for n, a in batch.items() if n != "labels"}).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


def test_only_layers_that_ran_get_gradients(artifact_folder: Path) -> None:
    artifact = open_artifact(artifact_folder, verify=False)
    rng = np.random.default_rng(0)
    ids = rng.integers(5, 2000, (4, 20))
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    batch["labels"] = rng.integers(0, 77, 4)
    with open_engine(artifact) as stack:
        grads = stack.step(batch, dropping(6, (0, 2, 5)), artifact.adapter()).grads
    layers = {int(n.split("encoder.layer.")[1].split(".")[0]) for n in grads if "encoder.layer." in n}
    assert layers == {1, 3, 4}


T, F, Y, B, D = Mode.TRAIN, Mode.FORWARD, Mode.BYPASS, Mode.BARE, Mode.DROP


@pytest.mark.shared_data
@pytest.mark.parametrize("plan", [(T, Y, T, Y, T, Y), (T, B, F, T, B, T), (B, B, T, Y, D, T)])
def test_modes_are_what_torch_makes_of_them(artifact_folder: Path, tmp_path: Path, plan: LayerPlan) -> None:
    """MiniLM is post-norm: around a block goes around its norms too."""
    data, artifact = banking(artifact_folder, "train"), open_artifact(artifact_folder, verify=False)
    rng = np.random.default_rng(0)
    adapter = {n: a + rng.normal(0, 0.02, a.shape).astype(np.float32) for n, a in artifact.adapter().items()}
    save_peft(tmp_path / "start", artifact.manifest, adapter)
    model = peft_model(tmp_path / "start", trainable=True)
    for layer, mode in zip(model.base_model.model.bert.encoder.layer, plan, strict=True):
        set_mode(layer, mode)
    batch = data.rows(np.arange(6))
    loss = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).loss
    loss.backward()
    torch_grads = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}
    with open_engine(artifact) as engine:
        step = engine.step(batch, plan, adapter)
    assert step.loss == pytest.approx(loss.item(), rel=1e-4)
    lora = [name for name in step.grads if "lora" in name]
    assert {int(name.split("layer.")[1].split(".")[0]) for name in lora} == {
        i for i, mode in enumerate(plan) if mode is T
    }
    for name in lora:
        expected = torch_grads[name].numpy()
        np.testing.assert_allclose(
            step.grads[name], expected, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )
