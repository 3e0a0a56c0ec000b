"""Providers of onnxruntime: which there are, who is refused, and that a bound run is the plain run."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.onnx_graphs import (
    PROVIDERS,
    OnnxGraph,
    array_of,
    find_provider,
    told,
    value_of,
)
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError, UnknownName


def test_the_cpu_is_always_there() -> None:
    assert find_provider("cpu") == PROVIDERS["cpu"]


@pytest.mark.parametrize("name", sorted(PROVIDERS.keys() - {"cpu"}))
def test_a_provider_that_is_not_there_is_refused_with_those_that_are(name, word_artifact) -> None:
    import onnxruntime as ort

    if PROVIDERS[name].names[0] in ort.get_available_providers():
        pytest.skip(f"this onnxruntime has {name}")
    with pytest.raises(
        ConfigError, match=rf"provider {name}: this build of onnxruntime .* has no .*; have: cpu"
    ):
        open_engine(open_artifact(word_artifact), provider=name)


def test_an_unknown_provider_names_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="no provider 'gpu'; have: cpu, cuda, tensorrt, xnnpack"):
        find_provider("gpu")


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_products_on_a_gpu_are_of_whole_floats(name, word_artifact, monkeypatch) -> None:
    """CUDA's own choice, on an H100: gradients 2e-3 off; 1e-6 without."""
    asked = []
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *_, providers: asked.extend(providers))
    OnnxGraph(word_artifact / "any.onnx", 1, provider=PROVIDERS[name])
    assert ("CUDAExecutionProvider", {"use_tf32": "0"}) in asked
    assert asked[-1] == ("CPUExecutionProvider", {})


def test_a_bound_run_is_the_plain_run(word_artifact) -> None:
    artifact = open_artifact(word_artifact)
    graph = artifact.manifest.head.graphs["predict"]
    opened = OnnxGraph(artifact.folder / graph.file, 1)
    rng = np.random.default_rng(0)
    sizes = {"batch": 3, "seq": 5}
    feeds = {
        port.name: value_of(rng.normal(size=[sizes.get(str(d), d) for d in port.shape]).astype(port.dtype))
        for port in graph.inputs
    }
    wanted = [port.name for port in graph.outputs]
    plain, bound = opened.run(feeds, wanted), opened.run_bound(feeds, wanted)
    assert all(np.array_equal(array_of(a), array_of(b)) for a, b in zip(plain, bound, strict=True))


def opened(word_artifact, section):
    manifest = open_artifact(word_artifact).manifest
    graph = getattr(manifest, section).graphs
    graph = graph.get("forward") or graph["predict"]
    return OnnxGraph(word_artifact / graph.file, 1), graph


def feeds_of(graph, ids):
    shapes = {"batch": ids.shape[0], "seq": ids.shape[1]}
    return {
        p.name: value_of(
            ids if p.name == "batch_0" else np.ones([shapes.get(str(d), d) for d in p.shape], p.dtype)
        )
        for p in graph.inputs
    }


def test_an_id_that_the_model_has_no_row_for_is_a_matter_of_the_data(word_artifact, capfd):
    """As an artifact of before has it, which does not say how many ids there are."""
    prelude, graph = opened(word_artifact, "prelude")
    ids = np.array([[1, 64]])
    with pytest.raises(
        DataError, match=r"an id for which the model has no row; prelude.forward.onnx: .*idx=64"
    ) as caught:
        prelude.run(feeds_of(graph, ids), [graph.outputs[0].name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert capfd.readouterr().err == "", "onnxruntime has a log of its own"


def test_what_onnxruntime_refuses_is_one_line_of_ours(word_artifact):
    head, graph = opened(word_artifact, "head")
    with pytest.raises(
        ArtifactError, match=r"the graph does not run; head.predict.onnx: onnxruntime .*"
    ) as caught:
        head.run({"nonsense": value_of(np.zeros(3))}, [graph.outputs[0].name])
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError, match="the graph does not run"):
        head.run({}, ["no such output"])


@pytest.mark.parametrize(
    "exc",
    [
        MemoryError(),
        RuntimeError("AllocateRawInternal Failed to allocate memory for requested buffer of size 9"),
    ],
)
def test_too_little_memory_names_the_way_out(exc):
    with pytest.raises(ConfigError, match=r"not enough memory: .*--memory-budget-mb"), told("x.onnx"):
        raise exc
