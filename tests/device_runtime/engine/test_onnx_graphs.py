"""Providers of onnxruntime: which there are, who is refused, and that a bound run is the plain run."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.onnx_graphs import PROVIDERS, OnnxGraph, array_of, find_provider, value_of
from fleetune.device_runtime.errors import ConfigError, UnknownName


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
