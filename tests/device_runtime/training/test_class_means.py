from types import SimpleNamespace

import numpy as np
import pytest
from tiny import draw_data, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, class_head
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.training.class_means import class_sums
from fleetune.device_runtime.training.held_out import split
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.trainer import Trainer


@pytest.fixture(scope="module")
def engine(word_artifact):
    with open_engine(open_artifact(word_artifact), threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def dataset(engine, word_artifact, word_file):
    return load_dataset(word_file, engine.artifact.manifest, word_artifact, seq_len=16)


def test_sums_counts_and_squares_are_those_of_the_features(engine, dataset):
    adapter, everything = noisy_adapter(engine.artifact), np.arange(dataset.num_samples)
    features = engine.features(dataset.rows(everything), adapter).astype(np.float64)
    found = class_sums(engine, dataset, adapter, batch_size=7)
    for c in range(5):
        mine = features[dataset.labels == c]
        np.testing.assert_allclose(found[SUMS][c], mine.sum(0), atol=1e-4)
        np.testing.assert_allclose(found[SQUARES][c], np.square(mine).sum(), rtol=1e-5)
    assert found[COUNTS].tolist() == np.bincount(dataset.labels, minlength=5).tolist()
    assert found[COUNTS][3:].tolist() == [0, 0], "d and e are in no line"


def test_the_order_of_the_samples_and_the_size_of_batches_hardly_matter(engine, dataset):
    adapter = noisy_adapter(engine.artifact)
    order = np.random.default_rng(0).permutation(dataset.num_samples)
    first = class_sums(engine, dataset, adapter)
    for again in (
        class_sums(engine, dataset.subset(order), adapter),
        class_sums(engine, dataset, adapter, batch_size=5),
    ):
        for name, wanted in first.items():
            np.testing.assert_allclose(again[name], wanted, atol=1e-5 * np.abs(wanted).max())


def test_the_same_call_gives_the_same_bits(engine, dataset):
    first, again = (class_sums(engine, dataset, engine.artifact.adapter()) for _ in range(2))
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)


WARM = [
    LocalWork(steps=6, batch_size=4, policy=PolicySpec(name="suffix", drop=0.5), held_out=0.1),
    LocalWork(steps=6, batch_size=4, policy=PolicySpec(name="head")),
    LocalWork(steps=6, batch_size=4, policy=PolicySpec(name="suffix", drop=0.5), cache_below=1),
]


@pytest.mark.parametrize("work", WARM, ids=["suffix", "head", "boundary"])
def test_what_the_pass_kept_the_first_steps_find(engine, word_artifact, dataset, tmp_path, work):
    """No row goes through the lower layers twice; the sums, and what is trained, are as without a cache that was warm."""
    artifact, trained = open_artifact(word_artifact), {}
    adapter = artifact.adapter()
    for name, is_warm in (("warm", True), ("cold", False)):
        with Machine(artifact, Resources(threads=1, hidden_cache_mb=10), folder=tmp_path / name) as machine:
            if is_warm:
                sums = machine.class_sums(dataset, work, adapter)
            before = machine._cache(dataset).size_bytes
            trainer = machine.trainer(dataset, work, adapter)
            while not trainer.done:
                trainer.step()
            trained[name] = trainer.adapter
            assert (before > 0) == is_warm
            assert (machine._cache(dataset).size_bytes > before) != is_warm
    plain = class_sums(engine, split(dataset, work.held_out).training, adapter, batch_size=4)
    assert all(plain[name].tobytes() == sums[name].tobytes() for name in plain)
    assert all(trained["warm"][n].tobytes() == value.tobytes() for n, value in trained["cold"].items())


def test_a_sample_without_a_class_is_left_out(engine):
    dataset = draw_data(engine.artifact.manifest, 8, 6)
    dataset.columns["labels"].values[:3] = -100
    assert class_sums(engine, dataset, engine.artifact.adapter())[COUNTS].sum() == 5


def test_before_each_batch_it_may_be_made_to_wait(engine, dataset):
    waits = []
    class_sums(
        engine, dataset, engine.artifact.adapter(), batch_size=50, before_batch=lambda: waits.append(1)
    )
    assert len(waits) == 3


class Bent:
    """An engine whose head does to its linear's logits what it likes."""

    def __init__(self, engine, *, bend=lambda logits: logits, features=lambda found: found):
        self.artifact, self.rows = engine.artifact, engine.rows
        self.predict = lambda *args, **kwargs: bend(engine.predict(*args, **kwargs))
        self.features = lambda *args, **kwargs: features(engine.features(*args, **kwargs))


@pytest.mark.parametrize("bend", [np.tanh, lambda x: x + 0.01, lambda x: x[:, ::-1], lambda x: x * np.nan])
def test_a_head_that_is_not_linear_is_refused(engine, dataset, bend):
    with pytest.raises(ConfigError, match=r"not linear in head\.weight"):
        class_sums(Bent(engine, bend=bend), dataset, engine.artifact.adapter())


def test_features_that_are_not_finite_are_refused(engine, dataset):
    calls = []

    def late(found):
        calls.append(1)
        return found if len(calls) < 2 else found * np.inf

    with pytest.raises(ConfigError, match="a feature is not finite"):
        class_sums(Bent(engine, features=late), dataset, engine.artifact.adapter(), batch_size=50)


def test_a_causal_model_is_refused_before_anything_runs(make_manifest):
    engine = SimpleNamespace(artifact=SimpleNamespace(manifest=make_manifest(task="causal-lm")))
    with pytest.raises(ConfigError, match="this model's task is causal-lm"):
        class_sums(engine, None, {})


WORK = LocalWork(steps=3, batch_size=8, seq_len=16, optimizer=OptimizerSpec(lr=0.01, proximal=0.5))


def test_a_run_that_begins_with_a_head_is_one_from_an_adapter_with_it(engine, dataset):
    adapter = engine.artifact.adapter()
    head = class_mean_head(class_sums(engine, dataset, adapter), class_head(engine.artifact.manifest))
    begun = Trainer(engine, dataset, WORK, adapter, head_start="class-mean")
    begun.begin_with(head)
    plain = Trainer(engine, dataset, WORK, {**adapter, **head})
    while not plain.done:
        assert begun.step().loss == plain.step().loss
    assert all(begun.adapter[name].tobytes() == plain.adapter[name].tobytes() for name in adapter)
    with pytest.raises(ConfigError, match="a run at step 3 begins with nothing"):
        begun.begin_with(head)


def test_a_run_begins_with_no_head_of_another_shape(engine, dataset):
    with pytest.raises(ArtifactError, match=r"head\.weight"):
        Trainer(engine, dataset, WORK, engine.artifact.adapter()).begin_with(
            {"head.weight": np.zeros((2, 16), np.float32)}
        )
