"""Opening an artifact by its backend: each runs or says why not."""

import dataclasses
from types import SimpleNamespace

import pytest
from msgspec.structs import replace

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, MemoryPlan
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine.backends import BACKENDS, open_engine
from fleetune.device_runtime.engine.engine import Setup
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.engine.ort_training import OrtTrainingEngine
from fleetune.device_runtime.engine.stack import Stack
from fleetune.device_runtime.errors import ArtifactError, ConfigError, UnknownName


@pytest.fixture
def artifact(word_artifact):
    return open_artifact(word_artifact)


def of_backend(artifact, name):
    return dataclasses.replace(artifact, manifest=replace(artifact.manifest, backend=name))


def test_block_graphs_are_run_by_a_stack(artifact):
    with open_engine(artifact, threads=1) as engine:
        assert isinstance(engine, Stack)
        assert engine.artifact is artifact


def test_an_unknown_backend_names_the_known_ones(artifact):
    with pytest.raises(UnknownName, match="'tflite'; have: executorch, onnx, ort-training"):
        open_engine(of_backend(artifact, "tflite"))


@pytest.mark.parametrize("name", ["executorch", "ort-training"])
def test_a_backend_of_the_cpu_takes_no_other_provider(artifact, name):
    with pytest.raises(ConfigError, match=f"provider cuda: the {name} backend runs on cpu"):
        open_engine(of_backend(artifact, name), provider="cuda")


@pytest.mark.parametrize("name", ["onnx", "ort-training"])
def test_threads_below_zero_are_refused(artifact, name):
    with pytest.raises(ConfigError, match="threads -1: expected 0"):
        open_engine(of_backend(artifact, name), threads=-1)


@pytest.mark.parametrize("name", sorted(BACKENDS.keys() - {"executorch"}))
def test_a_memory_plan_below_zero_is_refused(artifact, name):
    with pytest.raises(ConfigError):
        open_engine(of_backend(artifact, name), memory=MemoryPlan(-1))


def test_whole_models_follow_no_memory_plan(artifact, monkeypatch):
    with pytest.raises(ConfigError, match="run whole batches and keep all activations"):
        open_engine(of_backend(artifact, "ort-training"), memory=RECOMPUTE)
    monkeypatch.setattr("fleetune.device_runtime.engine.ort_training._api", lambda: None)
    monkeypatch.setattr("fleetune.device_runtime.engine.ort_training.read_layout", lambda artifact: {})
    with open_engine(of_backend(artifact, "ort-training")) as engine:
        assert engine.rows(16, 64) == Rows()
        with pytest.raises(ConfigError, match="run whole batches and keep all activations"):
            engine.rows(16, 64, RECOMPUTE)
        with pytest.raises(ConfigError, match=r"micro_tokens=256.* run whole batches"):
            engine.rows(16, 64, MemoryPlan(micro_tokens=256))


def test_an_artifact_of_blocks_is_no_whole_model(artifact, monkeypatch):
    monkeypatch.setattr("fleetune.device_runtime.engine.ort_training._api", lambda: None)
    with pytest.raises(ArtifactError, match="made for onnx, not for ort-training"):
        OrtTrainingEngine(artifact, Setup())


def test_whole_models_answer_at_full_depth_only():
    engine = SimpleNamespace(artifact=SimpleNamespace(manifest=SimpleNamespace(backend="ort-training")))
    with pytest.raises(ConfigError, match="backend ort-training: it answers at full depth only"):
        OrtTrainingEngine.predict(engine, {}, {}, plan=dropping(4, {1}))
