"""The stack as an engine: what it returns depends on its arguments alone, however rows are spread and whoever asked before."""

import dataclasses
from functools import partial

import numpy as np
import pytest
from msgspec.structs import replace
from tiny import draw_batch, draw_data, noisy_adapter

from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, full
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.training.evaluation import evaluate
from fleetune.device_runtime.training.trainer import Trainer

PLAN = full(4)
D, F, T = Mode.DROP, Mode.FORWARD, Mode.TRAIN
MICRO = MemoryPlan(micro_batch=4, saved_layers=1, streamed=True)


@pytest.fixture(scope="module")
def artifact(word_artifact):
    return open_artifact(word_artifact)


@pytest.fixture(scope="module")
def adapter(artifact):
    return noisy_adapter(artifact)


def figures(engine, batch, adapter, rows):
    """Everything that an engine makes of a batch, as bytes."""
    step = engine.step(batch, PLAN, adapter, rows=rows)
    loss, answers = engine.evaluate(batch, adapter, rows=rows)
    features = {name: array for name, array in batch.items() if name != "labels"}
    logits = engine.predict(features, adapter, rows=rows)
    return to_bytes(
        {
            "loss": np.array([step.loss, loss]),
            "answers": answers,
            "logits": step.logits,
            "predicted": logits,
            **step.grads,
        }
    )


def test_the_recorded_torch_step_is_replayed(word_artifact):
    report = selfcheck(word_artifact, threads=1)
    assert report.ok, report.tensors
    assert len(report.tensors) == 40  # two plans, each with saved and with recomputed activations


@pytest.mark.parametrize("rows", [8, 7])
@pytest.mark.parametrize("memory", [MemoryPlan(), MICRO, RECOMPUTE])
def test_lanes_make_the_step_that_one_would(artifact, adapter, rows, memory):
    batch = draw_batch(artifact.manifest, rows, 64)
    with open_engine(artifact, threads=2) as engine:
        assert engine.rows(rows, 64, memory) == Rows(2, memory)
        lanes, one = (engine.step(batch, PLAN, adapter, rows=Rows(n, memory)) for n in (2, 1))
        losses = [engine.evaluate(batch, adapter, rows=Rows(n, memory))[0] for n in (2, 1)]
    assert lanes.loss == pytest.approx(one.loss, rel=1e-5)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    np.testing.assert_allclose(lanes.logits, one.logits, rtol=1e-4, atol=2e-6)
    assert lanes.grads.keys() == one.grads.keys()
    for name, grad in one.grads.items():
        np.testing.assert_allclose(lanes.grads[name], grad, rtol=1e-4, atol=2e-6, err_msg=name)


LABELLED = {
    "a row each": [1, -100, 2, 3, -100, 1, -100],
    "none in the second lane": [3, 1, 2, 4, -100, -100, -100],
}


@pytest.mark.parametrize("labels", LABELLED.values(), ids=LABELLED)
@pytest.mark.parametrize(
    "rows", [Rows(2), Rows(1, MemoryPlan(1)), Rows(2, MemoryPlan(3)), Rows(2, MemoryPlan(1))]
)
def test_parts_weigh_by_their_labels_that_count(artifact, adapter, labels, rows):
    """The right value is the step on the labelled rows alone; a part without any must not make it NaN."""
    batch = draw_batch(artifact.manifest, 7, 16) | {"labels": np.array(labels)}
    some = {name: array[batch["labels"] != -100] for name, array in batch.items()}
    with open_engine(artifact, threads=2) as engine:
        found, expected = (
            engine.step(batch, PLAN, adapter, rows=rows),
            engine.step(some, PLAN, adapter, rows=Rows(1)),
        )
        assert engine.evaluate(batch, adapter, rows=rows)[0] == pytest.approx(expected.loss, rel=1e-5)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("rows", [Rows(1), Rows(2, MemoryPlan(1))])
def test_a_batch_without_a_label_teaches_nothing(artifact, adapter, rows):
    batch = draw_batch(artifact.manifest, 3, 8) | {"labels": np.full(3, -100)}
    with open_engine(artifact, threads=2) as engine:
        step = engine.step(batch, PLAN, adapter, rows=rows)
        assert engine.evaluate(batch, adapter, rows=rows)[0] == 0
    assert (step.loss, step.grads.keys()) == (0, adapter.keys())
    assert not any(grad.any() for grad in step.grads.values())


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_an_evaluation_is_one_mean_whatever_its_batches(artifact, adapter, batch_size):
    data = draw_data(artifact.manifest, 12, 8)
    data.columns["labels"].values[2:9] = -100
    with open_engine(artifact, threads=1) as engine:
        whole = engine.step(data.rows(np.arange(12)), PLAN, adapter)
        found = evaluate(engine, data, adapter, batch_size=batch_size)
    right = (whole.logits.argmax(-1) == data.labels)[data.labels != -100]
    assert found == (pytest.approx(whole.loss, rel=1e-5), pytest.approx(right.mean()), 12)


@pytest.mark.parametrize("sizes", [(8, 64), (1, 64), (8, 20), (3, 64)])
def test_what_was_run_before_changes_no_bit(artifact, adapter, sizes):
    """Also where it opened the graphs the other way: on lanes, or with kernels that share the threads."""
    batch = draw_batch(artifact.manifest, *sizes)
    with open_engine(artifact, threads=2) as engine:
        expected = figures(engine, batch, adapter, None)
    for size, memory in ((1, MemoryPlan()), (8, MICRO), (8, MemoryPlan())):
        with open_engine(artifact, threads=2) as engine:
            other = draw_batch(artifact.manifest, size, 64, seed=3)
            figures(engine, other, adapter, engine.rows(size, 64, memory))
            assert figures(engine, batch, adapter, None) == expected


def test_the_size_of_a_batch_decides_unless_told(artifact):
    with open_engine(artifact, threads=2) as engine:
        assert [engine.rows(*size).lanes for size in ((8, 64), (1, 64), (8, 20), (8, 0))] == [2, 1, 1, 2]
    with open_engine(artifact, threads=2, in_lanes=False) as engine:
        assert engine.rows(8, 64) == Rows(1)
    with open_engine(artifact, threads=2, memory=MICRO) as engine:
        assert engine.rows(8, 64) == Rows(2, MICRO)
        assert engine.rows(8, 64, RECOMPUTE) == Rows(2, RECOMPUTE)


def trained(trainer):
    while not trainer.done:
        trainer.step()
    return to_bytes(trainer.adapter)


WORKS = [LocalWork(steps=4, batch_size=16, seed=1), LocalWork(steps=4, batch_size=1, seed=2)]
MEMORIES = [MemoryPlan(), MemoryPlan(micro_batch=8, saved_layers=2), MemoryPlan(micro_tokens=100)]


def test_many_trainers_on_one_engine_are_each_what_it_is_alone(artifact, adapter):
    """Of other batch sizes and memory plans, made after the first has begun, taking turns, with evaluations between."""
    data = draw_data(artifact.manifest, 64, 24)
    arguments = [(work, memory) for work in WORKS for memory in MEMORIES]
    alone = []
    for work, memory in arguments:
        with open_engine(artifact, threads=2) as engine:
            alone.append(trained(Trainer(engine, data, work, adapter, memory=memory)))
    with open_engine(artifact, threads=2) as engine:
        trainers = []
        for work, memory in arguments:
            trainers.append(Trainer(engine, data, work, adapter, memory=memory))
            for trainer in trainers:
                if not trainer.done:
                    trainer.step()
            evaluate(engine, data, adapter, batch_size=1)
        assert [trained(trainer) for trainer in reversed(trainers)] == alone[::-1]
    assert alone[0] != alone[1]  # so that the above can fail


@pytest.mark.parametrize("plan", [(F, F, F, T), (F, D, T, T), (D, F, T, T)])
def test_what_is_stored_for_other_layers_below_is_not_used(artifact, adapter, tmp_path, plan):
    batch, examples = draw_batch(artifact.manifest, 4, 8), np.arange(4)
    with (
        HiddenCache(tmp_path, lengths=None, limit_bytes=10**6) as cache,
        open_engine(artifact, threads=1) as engine,
    ):
        expected = engine.step(batch, plan, adapter)
        engine.step(batch, (F, F, T, T), adapter, hidden=partial(cache.of, examples))
        found = [engine.step(batch, plan, adapter, hidden=partial(cache.of, examples)) for _ in range(2)]
    for step in found:
        np.testing.assert_allclose(step.logits, expected.logits, atol=2e-3)


def test_a_batch_that_does_not_fit_is_refused_with_every_difference(artifact, adapter):
    batch = draw_batch(artifact.manifest, 2, 8)
    batch["input_ids"] = batch["input_ids"].astype(np.int32)
    batch["surprise"] = batch.pop("labels")
    with (
        open_engine(artifact, threads=1) as engine,
        pytest.raises(
            ArtifactError, match=r"surprise: not an input.*input_ids: expected int64.*labels: missing"
        ),
    ):
        engine.step(batch, PLAN, adapter)


def test_a_plan_of_another_length_is_refused(artifact, adapter):
    with (
        open_engine(artifact, threads=1) as engine,
        pytest.raises(ConfigError, match="plan of 3 layers; the model has 4"),
    ):
        engine.step(draw_batch(artifact.manifest, 2, 8), full(3), adapter)


def test_a_head_that_answers_once_is_not_asked_at_positions(artifact, adapter):
    batch = draw_batch(artifact.manifest, 2, 8)
    with (
        open_engine(artifact, threads=1) as engine,
        pytest.raises(ConfigError, match="answers once for a row, not at positions"),
    ):
        engine.predict_at(batch, adapter, np.array([0, 1]))


def test_labels_are_known_by_their_role_not_by_their_name(artifact, adapter):
    inputs = tuple(
        replace(row, name="answer") if row.role == "labels" else row for row in artifact.manifest.inputs
    )
    renamed = dataclasses.replace(artifact, manifest=replace(artifact.manifest, inputs=inputs))
    batch = draw_batch(artifact.manifest, 4, 8)
    with open_engine(artifact, threads=1) as engine:
        expected = engine.step(batch, PLAN, adapter)
    batch["answer"] = batch.pop("labels")
    with open_engine(renamed, threads=1) as engine:
        assert engine.step(batch, PLAN, adapter).loss == expected.loss
        assert engine.evaluate(batch, adapter)[0] == pytest.approx(expected.loss, rel=1e-6)
        assert np.array_equal(engine.predict(batch, adapter), expected.logits)
