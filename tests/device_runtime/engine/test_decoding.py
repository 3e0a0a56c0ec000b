"""Token by token with a memory, and all tokens again: the same logits, whatever the adapter and the layers that are left out."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from paths import DATA
from tiny import noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine import onnx_graphs
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ArtifactError, ConfigError

IDS = np.array([[5, 9, 200, 31, 7, 7, 64, 100, 3]])


@pytest.fixture(scope="module")
def writer():
    return open_artifact(DATA / "tiny_writer")


@pytest.fixture(scope="module")
def engine(writer):
    with open_engine(writer, threads=1) as engine:
        yield engine


def without_steps(artifact):
    """As an artifact of before."""
    manifest = artifact.manifest
    prelude = msgspec.structs.replace(
        manifest.prelude, graphs={"forward": manifest.prelude.graphs["forward"]}
    )
    return replace(artifact, manifest=msgspec.structs.replace(manifest, prelude=prelude))


def fed(engine, adapter, cuts, *, ids=IDS, mask=None, plan=None):
    """Logits after each of the parts that end at ``cuts``."""
    decoding, start, found = engine.decode(adapter, plan=plan), 0, []
    for end in cuts:
        found.append(decoding.feed(ids[:, start:end], None if mask is None else mask[:, :end]))
        start = end
    return decoding, np.stack(found)


@pytest.mark.parametrize("dropped", [(), (1,), (0, 2)])
@pytest.mark.parametrize("cuts", [(9,), (1, 2, 3, 9), (7, 8, 9)])
def test_parts_say_what_the_whole_says(writer, engine, cuts, dropped):
    adapter, plan = noisy_adapter(writer), dropping(3, dropped)
    decoding, found = fed(engine, adapter, cuts, plan=plan)
    assert decoding.remembers
    with open_engine(without_steps(writer), threads=1) as old:
        again, expected = fed(old, adapter, cuts, plan=plan)
    assert not again.remembers
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_counts(writer, engine):
    plain, noisy = (fed(engine, adapter, (9,))[1] for adapter in (writer.adapter(), noisy_adapter(writer)))
    assert np.abs(plain - noisy).max() > 1e-2


def test_rows_of_a_batch_are_each_their_own_and_padding_is_not_seen(writer, engine):
    rows = np.concatenate([IDS, IDS[:, ::-1]])
    mask = np.ones_like(rows)
    mask[1, :3] = 0
    _, found = fed(engine, writer.adapter(), (5, 9), ids=rows, mask=mask)
    _, alone = fed(engine, writer.adapter(), (5, 9))
    np.testing.assert_allclose(found[:, 0], alone[:, 0], rtol=1e-4, atol=1e-5)
    other = rows.copy()
    other[1, :3] = 11
    np.testing.assert_allclose(
        fed(engine, writer.adapter(), (5, 9), ids=other, mask=mask)[1], found, rtol=1e-4, atol=1e-5
    )


def test_graphs_whose_values_grow_are_opened_as_such(writer, monkeypatch):
    """In the arena each of these sizes would be kept: 100 MB after 500 tokens of a model of 260,032 parameters."""
    opened = {}

    class Noted(onnx_graphs.OnnxGraph):
        def __init__(self, path, threads, *, grows=False, **options):
            opened[path.name] = grows
            super().__init__(path, threads, grows=grows, **options)

    monkeypatch.setattr(onnx_graphs, "OnnxGraph", Noted)
    with open_engine(writer, threads=1) as engine:
        fed(engine, writer.adapter(), (5, 9))
    assert opened == {"prelude.step.onnx": True, "block0.forward_step.onnx": True, "head.predict.onnx": False}


def test_more_tokens_than_positions_are_refused(writer):
    bounded = replace(writer, manifest=msgspec.structs.replace(writer.manifest, bounds={"seq": 8}))
    with open_engine(bounded, threads=1) as engine:
        decoding = engine.decode(writer.adapter())
        decoding.feed(IDS[:, :8])
        with pytest.raises(ArtifactError, match="seq 9: at most 8"):
            decoding.feed(IDS[:, 8:])


def test_a_graph_that_asks_for_what_no_step_gives_is_refused(writer):
    manifest = writer.manifest
    graph = manifest.kinds[0].graphs["forward_step"]
    asking = (msgspec.structs.replace(graph.inputs[0], role="d_hidden"), *graph.inputs[1:])
    kind = msgspec.structs.replace(
        manifest.kinds[0],
        graphs=manifest.kinds[0].graphs | {"forward_step": msgspec.structs.replace(graph, inputs=asking)},
    )
    strange = replace(writer, manifest=msgspec.structs.replace(manifest, kinds=(kind,)))
    with (
        open_engine(strange, threads=1) as engine,
        pytest.raises(ArtifactError, match=r"a step of tokens does not give .*; export again"),
    ):
        engine.decode(writer.adapter()).feed(IDS)


def test_a_classifier_does_not_write(word_artifact):
    with (
        open_engine(open_artifact(word_artifact), threads=1) as engine,
        pytest.raises(
            ConfigError, match="is for sequence-classification: its head answers with one of 5 classes"
        ),
    ):
        engine.decode({})
