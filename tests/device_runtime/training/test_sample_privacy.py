"""DP-SGD's steps: exact clipping, the sum whatever the lanes, secret batches, noise, and runs that go on to the bit."""

import math

import msgspec
import numpy as np
import pytest
from tiny import draw_batch, draw_data, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.training.trainer import Trainer

CLIP, SECRET, ROWS = 0.05, b"s" * 32, 24
STILL = 1e-6
"""So little noise that a step shows its sum."""


@pytest.fixture(scope="module")
def engine(word_artifact):
    with open_engine(open_artifact(word_artifact), threads=1) as opened:
        yield opened


def work(**changes):
    fields = {"sample_clip": CLIP, "sample_noise": STILL, "sample_rate": 0.25, "steps": 3, "seed": 3}
    fields["optimizer"] = OptimizerSpec(name="sgd", lr=1.0)
    return LocalWork(**{**fields, **changes})


def trainer_of(engine, job, *, secret=SECRET, rows=ROWS, **options):
    data = draw_data(engine.artifact.manifest, rows, 8)
    return Trainer(engine, data, job, noisy_adapter(engine.artifact), secret=secret, **options)


def ended(trainer):
    while not trainer.done:
        trainer.step()
    return trainer.adapter


def moved(trainer):
    """What one step of rate 1 has subtracted, as one vector for each tensor."""
    before = trainer.adapter
    trainer.step()
    return {name: np.float64(before[name]) - trainer.adapter[name] for name in before}


def by_hand(trainer, plan="full"):
    """The clipped gradients' sum, from the engine's ordinary step on each row alone."""
    engine, data, samples = trainer._engine, trainer._dataset, trainer._batch()
    layers, _ = trainer._planned(len(samples))
    sums = {name: np.zeros(value.shape) for name, value in trainer.adapter.items()}
    norms = []
    for sample in samples:
        grads = engine.step(data.rows(np.array([sample])), layers, trainer.adapter).grads
        norms.append(math.sqrt(sum(float(np.square(np.float64(g)).sum()) for g in grads.values())))
        for name, grad in grads.items():
            sums[name] += np.float64(grad) * min(1.0, CLIP / norms[-1])
    return sums, norms


@pytest.mark.parametrize(
    "policy",
    [PolicySpec(), PolicySpec(name="head"), PolicySpec(name="exact-k", drop=0.5)],
    ids=lambda p: p.name,
)
def test_a_step_is_the_sum_of_each_sample_s_clipped_gradient(engine, policy):
    trainer = trainer_of(engine, work(policy=policy))
    wanted, norms = by_hand(trainer)
    assert len(norms) > 2
    assert max(norms) > CLIP
    found = moved(trainer)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value / (0.25 * ROWS), atol=2e-6, err_msg=name)


def test_no_sample_s_part_exceeds_the_bound_in_float32_either(engine):
    privacy = trainer_of(engine, work())._privacy
    rng = np.random.default_rng(0)
    for scale in (1e-6, CLIP, 1.0, 1e30):
        grads = {n: np.float32(scale) * rng.standard_normal(1000).astype(np.float32) for n in "ab"}
        part = privacy.clipped(grads)
        norm = math.sqrt(sum(float(np.square(value).sum()) for value in part.values()))
        assert norm <= CLIP
        if scale < 1e-3:
            assert all(np.array_equal(part[n], grads[n]) for n in grads)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_counts_for_nothing(engine, value):
    privacy = trainer_of(engine, work())._privacy
    part = privacy.clipped({"a": np.array([value, 1.0], np.float32), "b": np.ones(2, np.float32)})
    assert not any(np.any(found) for found in part.values())


@pytest.mark.parametrize("memory", [MemoryPlan(micro_batch=3), MemoryPlan(micro_tokens=16)])
def test_the_sum_is_the_same_whatever_the_lanes_and_parts(engine, word_artifact, memory):
    usual = ended(trainer_of(engine, work()))
    with open_engine(open_artifact(word_artifact), threads=2) as two:
        for trainer in (trainer_of(two, work()), trainer_of(two, work(), memory=memory)):
            trainer._rows = trainer._rows._replace(
                lanes=2, memory=trainer._rows.memory._replace(micro_batch=2)
            )
            found = ended(trainer)
            for name in usual:
                np.testing.assert_allclose(found[name], usual[name], atol=1e-6)


def test_each_sample_is_drawn_by_itself_with_the_rate(engine):
    privacy = trainer_of(engine, work(), rows=400)._privacy
    draws = [privacy.batch(step) for step in range(400)]
    sizes, counts = np.array([len(d) for d in draws]), np.bincount(np.concatenate(draws), minlength=400)
    deviation = math.sqrt(400 * 0.25 * 0.75)
    assert abs(sizes.mean() - 100) < 6 * deviation / 20
    assert abs(sizes.std() / deviation - 1) < 0.2
    assert abs(counts.std() / deviation - 1) < 0.2
    assert len({tuple(d) for d in draws}) == 400


def test_batches_differ_with_the_secret_and_the_work_and_not_with_the_length(engine):
    usual = [tuple(trainer_of(engine, work())._privacy.batch(step)) for step in range(5)]
    longer = trainer_of(engine, work(steps=9))._privacy
    assert [tuple(longer.batch(step)) for step in range(5)] == usual
    decaying = OptimizerSpec(name="sgd", lr=1.0, decay="linear")
    for other in (
        trainer_of(engine, work(), secret=b"t" * 32),
        trainer_of(engine, work(seed=4)),
        trainer_of(engine, work(optimizer=decaying)),
    ):
        assert [tuple(other._privacy.batch(step)) for step in range(5)] != usual


def test_noise_has_its_deviation_in_every_tensor_of_every_step(engine):
    noises = []
    for seed in range(30):
        trainer = trainer_of(engine, work(sample_noise=200.0, seed=seed))
        noises.append(moved(trainer))
    wanted = 200.0 * CLIP / (0.25 * ROWS)
    for name in noises[0]:
        drawn = np.concatenate([one[name].ravel() for one in noises])
        assert abs(drawn.std() / wanted - 1) < 6 / math.sqrt(2 * drawn.size) + 0.01, name
        assert abs(drawn.mean()) < 6 * wanted / math.sqrt(drawn.size)


def test_an_empty_batch_is_a_step_of_noise_alone(engine):
    trainer = trainer_of(engine, work(sample_rate=1e-6, sample_noise=1.0))
    assert not len(trainer._batch())
    found = moved(trainer)
    wanted = CLIP / (1e-6 * ROWS)
    assert all(0.2 < value.std() / wanted < 5 for value in found.values())
    assert trainer.history[0].loss == 0.0


def test_layers_that_a_policy_drops_get_no_noise(engine):
    found = moved(trainer_of(engine, work(policy=PolicySpec(name="head"), sample_noise=1.0)))
    assert {name for name, value in found.items() if value.any()} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_cut_anywhere_ends_equal_to_the_bit(engine, tmp_path, optimizer):
    job = work(steps=4, sample_noise=1.0, optimizer=OptimizerSpec(name=optimizer, lr=0.01))
    straight = ended(trainer_of(engine, job))
    for cut in (1, 3):
        first = trainer_of(engine, job)
        for _ in range(cut):
            first.step()
        first.save(tmp_path / "c.safetensors")
        second = trainer_of(engine, job)
        second.restore(tmp_path / "c.safetensors")
        found = ended(second)
        assert all(np.array_equal(found[name], straight[name]) for name in straight)


def test_without_a_secret_of_the_device_no_run_can_be_made_again(engine):
    first, second = (ended(trainer_of(engine, work(sample_noise=1.0), secret=b"")) for _ in range(2))
    assert not np.array_equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sample_clip": 0.0}, "sample_clip must be above 0"),
        ({"sample_noise": 0.0}, "sample_noise must be above 0"),
        ({"sample_rate": 0.0}, "sample_rate must be above 0"),
        ({"sample_clip": -1.0}, "sample_clip must be at least 0, got -1.0"),
        ({"sample_noise": -1.0}, "sample_noise must be at least 0, got -1.0"),
        ({"sample_clip": math.nan}, "sample_clip must be at least 0, got nan"),
        ({"sample_noise": 1e300}, "sample_noise must be at most 1000000"),
        ({"sample_rate": 1.5}, "sample_rate must be at most 1"),
        ({"sample_rate": 1e-9}, "sample_rate must be at least 1e-06, got 1e-09"),
        ({"held_out": 0.1}, "held_out measures samples"),
        ({"personal": 1}, "personal keeps back layers"),
        ({"mask": "consensus"}, "mask is made from gradients without noise"),
        ({"noise": 1.0, "most_norm": 1.0}, "noise is of dp on whole updates"),
        ({"policy": PolicySpec(name="exact-k", drop=0.5, gates="row")}, "gates by row"),
        ({"policy": PolicySpec(name="exact-k", drop=0.5, protected=1, protect="effect")}, "protect 'effect'"),
    ],
)
def test_what_it_cannot_be_had_with_is_refused_in_a_line(engine, changes, said):
    with pytest.raises(ConfigError, match=said):
        trainer_of(engine, work(**changes))


def test_an_epoch_takes_each_sample_once_on_average(engine):
    job = msgspec.structs.replace(work(sample_rate=0.3), steps=0, epochs=2)
    assert trainer_of(engine, job).total_steps == 8


@pytest.mark.parametrize("memory", [MemoryPlan(), MemoryPlan(micro_batch=3)])
def test_an_engine_that_is_asked_for_each_row_s_gradients_runs_them_one_by_one(engine, memory):
    manifest, adapter, seen = engine.artifact.manifest, noisy_adapter(engine.artifact), []
    batch, plan = draw_batch(manifest, 5, 8), full(manifest.num_layers)
    found = engine.step(
        batch, plan, adapter, rows=engine.rows(5, 8, memory), each=lambda grads: seen.append(1) or grads
    )
    mean = engine.step(batch, plan, adapter)
    assert len(seen) == 5
    assert found.loss == pytest.approx(5 * mean.loss, rel=1e-5)
    for name, grad in mean.grads.items():
        np.testing.assert_allclose(found.grads[name], 5 * grad, atol=1e-5)
