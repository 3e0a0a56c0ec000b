"""A run that trains a part of its LoRA: no A (FFA-LoRA), or the first components of every pair (HetLoRA)."""

import numpy as np
import pytest
from lora_stack import RANK, a_of, b_of, lora_manifest, lora_stack

from fleetune.device_runtime.contracts.lora import drawn_rows, truncated
from fleetune.device_runtime.contracts.thresholds import blank_thresholds, parameters_of, thresholds_of
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import text_dataset
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.optim import OPTIMIZERS
from fleetune.device_runtime.training.trainer import Trainer

PARTS = [{"frozen": "lora-a"}, {"rank": 2}, {"frozen": "lora-a", "rank": 1}, {"rows": 2, "rows_seed": 5}]


@pytest.fixture
def make_trainer(make_manifest, linear_stack, text_folder):
    manifest = lora_manifest(make_manifest)
    labels = np.arange(12) % 3
    inputs = text_dataset([f"{'abc'[i]} word" for i in labels], manifest, text_folder, seq_len=8)
    columns = {**inputs.columns, "labels": Dense(labels.astype(np.int64))}
    dataset = make_dataset(columns, inputs.lengths, seq_len=8, num_classes=3)

    def make(optimizer="adamw", **part):
        stack = lora_stack(linear_stack)(manifest)
        spec = OptimizerSpec(name=optimizer, lr=0.05, weight_decay=0.1, proximal=0.1, clip_norm=1.0)
        return Trainer(
            stack, dataset, LocalWork(optimizer=spec, steps=8, batch_size=4, **part), stack.adapter()
        )

    return make


def trained(trainer, num_steps=8):
    for _ in range(num_steps):
        trainer.step()
    return trainer.adapter


def same(left, right):
    return left.keys() == right.keys() and all(left[n].tobytes() == right[n].tobytes() for n in left)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_frozen_a_keeps_every_bit_and_b_and_head_learn(make_trainer, optimizer):
    trainer = make_trainer(optimizer, frozen="lora-a")
    start = trainer.adapter
    end = trained(trainer)
    changed = {name for name in start if start[name].tobytes() != end[name].tobytes()}
    assert changed == {b_of(0), b_of(1), b_of(2), "head.w"}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_components_beyond_the_rank_are_zeros_from_the_start_to_the_end(make_trainer, optimizer):
    trainer = make_trainer(optimizer, rank=2)
    start = trainer.adapter
    assert same(start, truncated(make_trainer().adapter, 2))
    end = trained(trainer)
    for i in range(3):
        assert not end[a_of(i)][2:].any()
        assert not end[b_of(i)][:, 2:].any()
        assert (end[a_of(i)][:2] != start[a_of(i)][:2]).any()
        assert (end[b_of(i)][:, :2] != start[b_of(i)][:, :2]).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_rows_that_are_not_drawn_keep_every_bit_whatever_the_optimizer_does(make_trainer, optimizer, rows):
    """Weight decay and the proximal term move all that has a gradient, and Adam goes on without one."""
    trainer = make_trainer(optimizer, rows=rows, rows_seed=5, rounds_before=2)
    start = trainer.adapter
    assert same(start, make_trainer().adapter), "they are not zeros: others hold them"
    drawn = drawn_rows(start, LocalWork(rows=rows, rows_seed=5, rounds_before=2))
    end = trained(trainer)
    for i in range(3):
        still = np.setdiff1d(np.arange(RANK), drawn[a_of(i)])
        assert end[a_of(i)][still].tobytes() == start[a_of(i)][still].tobytes()
        assert end[b_of(i)][:, still].tobytes() == start[b_of(i)][:, still].tobytes()
        moving = drawn[b_of(i)]
        assert (end[b_of(i)][:, moving] != start[b_of(i)][:, moving]).any(axis=0).all()


def test_gradients_of_rows_that_do_not_learn_count_in_no_norm(make_trainer):
    """Clipped to the norm of what learns, as if nothing else were there."""
    trainer = make_trainer("sgd", rows=1, rows_seed=5)
    drawn, step = drawn_rows(trainer.adapter, LocalWork(rows=1, rows_seed=5)), trainer._engine.step

    def loud(*rest, **named):
        found = step(*rest, **named)
        for name, rows in drawn.items():
            still = np.setdiff1d(np.arange(RANK), rows)
            grad = found.grads[name].copy()
            (grad if name.endswith("A.weight") else grad.T)[still] = 1e6
            found.grads[name] = grad
        return found

    trainer._engine.step = loud
    assert same(trained(trainer), trained(make_trainer("sgd", rows=1, rows_seed=5)))


def test_a_gradient_beyond_the_rank_is_not_followed(make_trainer):
    """Of a graph whose gradient there is not exactly zero."""
    trainer = make_trainer(rank=1)
    step = trainer._engine.step

    def noisy(*rest, **named):
        found = step(*rest, **named)
        found.grads[a_of(0)] = found.grads[a_of(0)] + 1
        return found

    trainer._engine.step = noisy
    assert not trained(trainer)[a_of(0)][1:].any()


def test_all_components_are_what_rank_0_trains(make_trainer):
    assert same(trained(make_trainer(rank=RANK)), trained(make_trainer()))


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_a_run_of_a_part_cut_anywhere_ends_equal_to_the_bit(make_trainer, tmp_path, part):
    straight = trained(make_trainer(**part))
    for cut in (1, 5, 8):
        first, second = make_trainer(**part), make_trainer(**part)
        trained(first, cut)
        first.save(tmp_path / "c")
        second.restore(tmp_path / "c")
        assert same(trained(second, 8 - cut), straight)


def test_a_checkpoint_of_another_part_is_refused(make_trainer, tmp_path):
    trainer = make_trainer(rank=2)
    trainer.step()
    trainer.save(tmp_path / "c")
    with pytest.raises(ConfigError, match="rank: 2 there, 3 here"):
        make_trainer(rank=3).restore(tmp_path / "c")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"rank": 5}, "rank 5: the artifact's LoRA has rank 4"),
        ({"rank": -1}, "rank must be at least 0, got -1"),
        ({"frozen": "lora-b"}, "no frozen 'lora-b'; have: '', lora-a"),
    ],
)
def test_a_part_that_is_not_there_is_refused(make_trainer, part, said):
    with pytest.raises(ConfigError, match=said):
        make_trainer(**part)


@pytest.fixture
def with_thresholds(make_trainer):
    """A trainer of adapter and thresholds, of which the first of every pair prunes its row."""

    def make(**part):
        trainer = make_trainer(**part)
        start = trainer.adapter
        high = {n: t + np.float32([0.9, 0, 0, 0]) for n, t in blank_thresholds(start).items()}
        return Trainer(trainer._engine, trainer._dataset, trainer._work, {**start, **high})

    return make


def test_the_engine_runs_without_what_is_pruned_and_thresholds_learn(with_thresholds):
    trainer, seen = with_thresholds(mask="thresholds"), []
    step = trainer._engine.step
    trainer._engine.step = lambda batch, plan, adapter, **named: (
        seen.append(adapter) or step(batch, plan, adapter, **named)
    )
    start = dict(trainer.adapter)
    end = trained(trainer)
    assert all(
        not adapter[a_of(i)][0].any() and adapter[a_of(i)][1:].any() for adapter in seen for i in range(3)
    )
    assert seen[0].keys() == parameters_of(start).keys()
    moved = [end[n] != start[n] for n in thresholds_of(start)]
    assert np.all(moved), "the penalty moves all"
    assert trainer.personal == parameters_of(start).keys()


def test_a_run_with_thresholds_cut_anywhere_ends_equal_to_the_bit(with_thresholds, tmp_path):
    straight = trained(with_thresholds(mask="thresholds"))
    for cut in (1, 5, 8):
        first, second = with_thresholds(mask="thresholds"), with_thresholds(mask="thresholds")
        trained(first, cut)
        first.save(tmp_path / "c")
        second.restore(tmp_path / "c")
        assert same(trained(second, 8 - cut), straight)
