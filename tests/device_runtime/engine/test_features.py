"""What the last linear sees: found with rows of the identity in its place, after one way up through the layers."""

import numpy as np
import pytest
from tiny import draw_batch, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.engine.ort_training import OrtTrainingEngine
from fleetune.device_runtime.errors import ArtifactError, ConfigError


@pytest.fixture(scope="module")
def engine(word_artifact):
    with open_engine(open_artifact(word_artifact), threads=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter(engine):
    return noisy_adapter(engine.artifact)


@pytest.fixture(scope="module")
def batch(engine):
    return draw_batch(engine.artifact.manifest, 5, 6)


def test_they_are_the_mean_of_the_hidden_stream_as_this_model_takes_it(engine, adapter, batch):
    chain, weights = engine._chain(1), engine._weights(adapter, Rows())
    hidden = np.asarray(
        chain._loader.array_of(chain._climbed(batch, weights).scope["hidden", 0])
    )  # (B, S, H)
    mask = batch["attention_mask"][..., None]
    wanted = (hidden * mask).sum(1) / mask.sum(1)
    found = engine.features(batch, adapter)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("rows", [None, Rows(lanes=2), Rows(memory=MemoryPlan(micro_batch=2, streamed=True))])
def test_the_logits_are_the_linear_of_them(engine, adapter, batch, rows):
    found = engine.features(batch, adapter, rows=rows) @ adapter["head.weight"].T + adapter["head.bias"]
    np.testing.assert_allclose(found, engine.predict(batch, adapter), atol=1e-5)


def test_neither_labels_nor_the_head_have_a_say(engine, adapter, batch):
    other = {**adapter, "head.weight": adapter["head.weight"] + 1, "head.bias": adapter["head.bias"] + 1}
    unlabelled = {name: array for name, array in batch.items() if name != "labels"}
    assert np.array_equal(engine.features(unlabelled, other), engine.features(batch, adapter))


def test_the_layers_run_once(engine, adapter, batch, monkeypatch):
    chain, climbs = engine._chain(1), []
    real = chain._rise
    monkeypatch.setattr(chain, "_rise", lambda rows, layers: (climbs.append(layers), real(rows, layers))[1])
    engine.features(batch, adapter, rows=Rows())
    assert [layer for layers in climbs for layer in layers] == [0, 1, 2, 3]


def test_a_batch_that_does_not_fit_is_refused(engine, adapter, batch):
    with pytest.raises(ArtifactError, match="input_ids: missing"):
        engine.features({"attention_mask": batch["attention_mask"]}, adapter)


def test_whole_models_are_refused():
    with pytest.raises(ConfigError, match="ort-training are whole"):
        OrtTrainingEngine.features(object.__new__(OrtTrainingEngine), {}, {})
