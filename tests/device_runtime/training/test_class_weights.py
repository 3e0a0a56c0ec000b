"""Weights of classes: how they are read, and a weighted step against its rows taken one by one."""

from pathlib import Path

import numpy as np
import pytest
from tiny import draw_batch, draw_data, noisy_adapter

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.pulls import pulls_of
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.training.class_weights import read_class_weights
from fleetune.device_runtime.training.trainer import Trainer

WEIGHTS = np.array([1, 0.2, 3, 1, 0.2], np.float32)


def test_weights_by_name_and_balanced(word_artifact: Path) -> None:
    manifest = open_artifact(word_artifact).manifest
    data = draw_data(manifest, 9, 8)
    named = read_class_weights(" b = 2 ,e=0.5", manifest, data)
    assert named is not None
    assert named.tolist() == [1, 2, 1, 1, 0.5]
    counts = np.bincount(data.labels, minlength=5)
    balanced = read_class_weights("balanced", manifest, data)
    assert balanced is not None
    assert balanced[counts > 0] == pytest.approx(9 / ((counts > 0).sum() * counts[counts > 0]))
    assert read_class_weights("", manifest, data) is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x=2", "no label 'x'; have: a, b"),
        ("a=0", "a=0: expected a number above 0"),
        ("a=nan", "a=nan: expected a number"),
        ("a=much", "a=much: expected a number"),
        ("a=1,a=2", "label 'a' is there twice"),
        ("a", "expected balanced, or names with weights, as a=2,b=1"),
        ("a=1,,b=1", "expected balanced, or names"),
    ],
)
def test_what_is_no_weight_is_refused(word_artifact: Path, given: str, said: str) -> None:
    manifest = open_artifact(word_artifact).manifest
    with pytest.raises(ConfigError, match=said):
        read_class_weights(given, manifest, draw_data(manifest, 4, 8))


@pytest.mark.parametrize(
    ("threads", "memory"), [(1, SAVE_ALL), (2, SAVE_ALL), (1, MemoryPlan(micro_batch=2))]
)
def test_a_weighted_step_is_the_weighted_mean_of_its_rows(
    word_artifact: Path, threads: int, memory: MemoryPlan
) -> None:
    artifact = open_artifact(word_artifact)
    batch, adapter, plan = draw_batch(artifact.manifest, 6, 8), noisy_adapter(artifact), full(4)
    with open_engine(artifact, threads=threads, memory=memory) as engine:
        found = engine.step(batch, plan, adapter, class_weights=WEIGHTS)
        alone = [engine.step({n: a[i : i + 1] for n, a in batch.items()}, plan, adapter) for i in range(6)]
    own = WEIGHTS[batch["labels"]]
    shares = own / own.sum()
    assert len(set(own.tolist())) > 1
    assert found.loss == pytest.approx(
        sum(s * row.loss for s, row in zip(shares, alone, strict=True)), rel=1e-5
    )
    for name, grad in found.grads.items():
        expected = sum(s * row.grads[name] for s, row in zip(shares, alone, strict=True))
        np.testing.assert_allclose(grad, expected, atol=2e-6, err_msg=name)
    assert found.pulls is not None
    assert found.logits is not None
    whole = pulls_of(found.logits, batch["labels"], None, weights=WEIGHTS)
    assert whole is not None
    np.testing.assert_allclose(found.pulls.head, whole.head, rtol=1e-4)


def test_a_hidden_sample_has_no_class_weights(word_artifact: Path) -> None:
    artifact = open_artifact(word_artifact)
    work = LocalWork(steps=1, sample_clip=1.0, sample_noise=1.0, sample_rate=0.5)
    with open_engine(artifact) as engine, pytest.raises(ConfigError, match="dp sample: class weights"):
        Trainer(
            engine, draw_data(artifact.manifest, 8, 8), work, artifact.adapter(), class_weights="balanced"
        )


def test_equal_weights_are_no_weights(word_artifact: Path) -> None:
    artifact = open_artifact(word_artifact)
    batch, adapter = draw_batch(artifact.manifest, 4, 8), noisy_adapter(artifact)
    grads: list[Arrays] = []
    with open_engine(artifact) as engine:
        for weights in (None, np.full(5, 0.125, np.float32)):
            grads.append(engine.step(batch, full(4), adapter, class_weights=weights).grads)
    for name, grad in grads[0].items():
        np.testing.assert_array_equal(grad, grads[1][name])


def test_a_work_that_weighs_one_sample_above_all_has_few_behind_it(word_artifact: Path) -> None:
    """So that an owner's floor of samples in effect holds against weights too."""
    artifact = open_artifact(word_artifact)
    data = draw_data(artifact.manifest, 40, 8)
    labels = data.labels.copy()
    labels[labels == 0] = 1
    labels[0] = 0
    data.columns[data.label_name].values[:] = labels.reshape(data.columns[data.label_name].values.shape)
    behind = {}
    with open_engine(artifact) as engine:
        for given in ("", "a=1000000"):
            work = LocalWork(steps=2, batch_size=40, class_weights=given)
            trainer = Trainer(engine, data, work, artifact.adapter())
            while not trainer.done:
                trainer.step()
            behind[given] = trainer.effective_samples
    assert behind["a=1000000"] < 2 < 20 < behind[""]
