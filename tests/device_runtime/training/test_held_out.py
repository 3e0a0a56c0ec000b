import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.training.evaluation import evaluate
from fleetune.device_runtime.training.held_out import ROWS_MAX, measured, split
from fleetune.device_runtime.training.trainer import Trainer

HELD = {"held_loss_before", "held_loss_after", "held_accuracy_before", "held_accuracy_after", "held_samples"}


def rows(count, *, num_classes=3, seed=0):
    """Rows of 1 to 5 tokens whose class is that of their first token."""
    lengths = np.random.default_rng(seed).integers(1, 6, count)
    ids = np.random.default_rng(seed + 1).integers(1, 40, int(lengths.sum()))
    labels = np.arange(count) % num_classes
    return make_dataset(
        {
            "input_ids": Ragged(ids, lengths, 0, "int64"),
            "attention_mask": Ragged(np.ones_like(ids), lengths, 0, "int64"),
            "labels": Dense(labels),
        },
        lengths,
        seq_len=8,
        num_classes=num_classes,
        label_name="labels",
    )


@pytest.mark.parametrize(
    ("count", "share", "held"),
    [(100, 0.1, 10), (3, 0.1, 1), (2, 0.5, 1), (5, 0.5, 2), (5000, 0.5, ROWS_MAX), (45, 0.0, 0), (1, 0.5, 0)],
)
def test_a_share_is_held_out_at_least_one_at_most_half_and_never_many(count, share, held):
    whole = rows(count)
    made = split(whole, share)
    assert (made.held.num_samples if made.held else 0) == held
    assert made.training.num_samples == len(made.kept) == count - held
    places = np.arange(made.training.num_samples)
    assert np.array_equal(
        made.training.rows(places)["input_ids"],
        whole.rows(made.kept)["input_ids"][:, : made.training.width_of(places)],
    )


def test_the_same_data_holds_the_same_rows_out_wherever_it_is():
    assert np.array_equal(split(rows(60), 0.2).kept, split(rows(60), 0.2).kept)
    assert not np.array_equal(split(rows(60), 0.2).kept, split(rows(60, seed=5), 0.2).kept)


@pytest.mark.parametrize("dataset", [rows(40, num_classes=1), rows(1)], ids=["one class", "one sample"])
def test_nothing_is_held_out_where_nothing_can_be_learned_from_it(dataset):
    assert split(dataset, 0.3).held is None
    assert split(dataset, 0.3).training is dataset


def test_measuring_costs_little_beside_training():
    held = split(rows(400), 0.15).held
    assert held.num_samples == 60
    assert measured(held, num_trained=10_000) is held
    assert measured(held, num_trained=320).num_samples == 20
    assert measured(held, num_trained=1).num_samples == 16


@pytest.fixture
def make(linear_stack, make_manifest):
    def make(dataset, clock=None, **changes):
        stack = linear_stack(make_manifest())
        work = LocalWork(**{"epochs": 2, "batch_size": 8, "held_out": 0.2, "seed": 5, **changes})
        return Trainer(stack, dataset, work, stack.adapter(), **({"clock": clock} if clock else {}))

    return make


def run(trainer, num_steps=10**6):
    while not trainer.done and num_steps:
        trainer.step()
        num_steps -= 1
    return trainer


def test_what_is_held_out_never_trains(make, linear_stack):
    whole = rows(60)
    trainer = make(whole)
    seen, step = [], trainer._engine.step
    trainer._engine.step = lambda batch, *rest, **named: (
        seen.append(batch["input_ids"].sum(1).tolist()),
        step(batch, *rest, **named),
    )[1]
    run(trainer)
    kept = split(whole, 0.2).training
    expected = kept.rows(np.arange(kept.num_samples))["input_ids"].sum(1).tolist()
    assert sorted(place for batch in seen for place in batch) == sorted(2 * expected)
    assert len(expected) == 48


def test_the_hidden_cache_is_asked_by_the_places_in_the_whole_data_set(make):
    whole, asked = rows(60), []

    class Cache:
        def of(self, places, *_):
            asked.extend(places.tolist())

    trainer = make(whole, epochs=1)
    trainer._hidden, step = Cache(), trainer._engine.step
    trainer._engine.step = lambda *rest, hidden, **named: (hidden(), step(*rest, **named))[1]
    run(trainer)
    assert sorted(asked) == split(whole, 0.2).kept.tolist()


def test_the_figures_are_those_of_an_evaluation_before_and_after(make):
    trainer = make(rows(60))
    stack, held = trainer._engine, split(rows(60), 0.2).held
    before = evaluate(stack, held, trainer.adapter)
    stats = run(trainer).stats
    after = evaluate(stack, held, trainer.adapter)
    assert stats.keys() == HELD | {"held_seconds", "trained_layers"}
    assert stats["held_loss_before"] == pytest.approx(before.loss)
    assert stats["held_loss_after"] == pytest.approx(after.loss)
    assert stats["held_accuracy_after"] == after.accuracy
    assert after.loss != before.loss
    assert (stats["held_samples"], stats["trained_layers"]) == (12, 3)


def test_measuring_is_no_part_of_a_step_s_time(make):
    ticks = iter(range(100))
    stats = run(make(rows(60), lambda: float(next(ticks)), steps=4)).stats
    assert stats["held_seconds"] == 2.0


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_resumed_run_tells_the_same(make, tmp_path, cut):
    ticks = iter([float(n) for n in range(1000)])
    changes = {"steps": 7, "policy": PolicySpec(name="bernoulli", drop=0.5)}
    straight = run(make(rows(60), lambda: next(ticks), **changes)).stats
    first = run(make(rows(60), lambda: next(ticks), **changes), cut)
    first.save(tmp_path / "c")
    second = make(rows(60), lambda: next(ticks), **changes)
    second.restore(tmp_path / "c")
    assert dict(run(second).stats) == dict(straight)


def test_a_checkpoint_of_a_release_that_measured_nothing_leaves_the_figures_out(make, tmp_path, monkeypatch):
    first = run(make(rows(60)), 2)
    first._figures = {}
    first.save(tmp_path / "c")
    second = make(rows(60))
    second.restore(tmp_path / "c")
    assert dict(run(second).stats) == {}


def test_devices_with_one_sample_or_one_class_train_without_figures(make):
    for dataset in (rows(1), rows(30, num_classes=1)):
        assert run(make(dataset)).stats.keys() == {"trained_layers"}


def test_a_loss_that_is_no_number_is_left_out(make):
    trainer = make(rows(40))
    trainer._engine.evaluate = lambda *_, **__: (float("nan"), np.zeros(8, np.int64))
    run(trainer)
    assert trainer.stats.keys() == {"held_seconds", "trained_layers"}


def test_the_share_has_a_law(make):
    with pytest.raises(Exception, match=r"held_out must be at most 0\.5|held_out must be"):
        make(rows(60), held_out=0.7)
    with pytest.raises(Exception, match="held_out"):
        make(rows(60), held_out=float("nan"))
    assert msgspec.structs.replace(LocalWork(), held_out=0.5).held_out == 0.5
