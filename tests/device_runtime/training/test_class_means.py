from types import SimpleNamespace

import numpy as np
import pytest
from tiny import draw_data, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, class_head
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.training.class_means import class_sums
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
