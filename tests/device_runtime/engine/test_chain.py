"""Which graphs a step runs, in which order, and that what comes out is the slope of the loss."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from tiny import draw_batch, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Port
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, dropping, full, route
from fleetune.device_runtime.engine.chain import Chain
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.engine.loaders import onnx_loader
from fleetune.device_runtime.engine.weights import FrozenWeights

D, F, T = Mode.DROP, Mode.FORWARD, Mode.TRAIN


@dataclass
class Bench:
    """A chain whose graphs tell when they run."""

    folder: Path
    ran: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.artifact = open_artifact(self.folder)
        real = onnx_loader(1, "cpu")
        self.chain = Chain(self.artifact, real._replace(open=self._open(real.open)), threads=1)
        self.frozen = FrozenWeights(self.artifact, real.value_of)
        self.adapter = noisy_adapter(self.artifact)

    def _open(self, real):
        def opened(path, threads):
            graph = real(path, threads)
            run = graph.run
            graph.run = lambda feeds, wanted: (self.ran.append(path.stem), run(feeds, wanted))[1]
            return graph

        return opened

    def step(self, plan, memory=SAVE_ALL, *, rows=3, adapter=None, hidden=None):
        self.ran.clear()
        weights = self.frozen.of_step(adapter or self.adapter, streamed=False)
        batch = draw_batch(self.artifact.manifest, rows, 6)
        return self.chain.step(batch, route(plan, memory), weights, keep_logits=False, hidden=hidden)

    @property
    def blocks(self):
        return [name.removeprefix("block0.") for name in self.ran if name.startswith("block0.")]


@pytest.fixture(scope="module")
def bench(word_artifact):
    return Bench(word_artifact)


@pytest.mark.parametrize(
    ("plan", "memory", "expected"),
    [
        (full(4), SAVE_ALL, ["forward_save"] * 4 + ["backward"] * 3 + ["backward_lowest"]),
        (
            full(4),
            RECOMPUTE,
            ["forward"] * 4 + ["backward_recompute"] * 3 + ["backward_lowest_recompute"],
        ),
        (
            full(4),
            MemoryPlan(saved_layers=1),
            ["forward"] * 3
            + ["forward_save", "backward"]
            + ["backward_recompute"] * 2
            + ["backward_lowest_recompute"],
        ),
        (dropping(4, (0, 2)), SAVE_ALL, ["forward_save"] * 2 + ["backward", "backward_lowest"]),
        ((F, F, F, T), SAVE_ALL, ["forward"] * 3 + ["forward_save", "backward_lowest"]),
        ((F, T, F, D), SAVE_ALL, ["forward", "forward_save", "forward_save", "backward", "backward_lowest"]),
        ((F,) * 4, SAVE_ALL, ["forward"] * 4),
        ((D,) * 4, SAVE_ALL, []),
    ],
)
def test_a_route_runs_these_graphs_and_no_other(bench, plan, memory, expected):
    result = bench.step(plan, memory)
    assert bench.blocks == expected
    assert bench.ran[0] == "prelude.forward"
    assert bench.ran.count("head.train") == 1
    layers = {f"blocks.{i}." for i, mode in enumerate(plan) if mode is T}
    assert {name.partition("down")[0].partition("up")[0] for name in result.grads} == layers | {
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("plan", [full(4), dropping(4, (1,)), (F, T, F, T)])
def test_a_gradient_is_the_slope_of_the_loss(bench, plan):
    """Along the gradient of each tensor, by central differences."""
    result = bench.step(plan)
    for name, grad in result.grads.items():
        norm = np.linalg.norm(grad)
        ahead, behind = (
            bench.step(plan, adapter={**bench.adapter, name: bench.adapter[name] + s * grad / norm}).loss
            for s in (np.float32(1e-2), np.float32(-1e-2))
        )
        assert (ahead - behind) / 2e-2 == pytest.approx(norm, rel=0.02, abs=2e-4), name


def test_recomputing_is_the_same_step(bench):
    expected, found = bench.step(full(4)), bench.step(full(4), RECOMPUTE)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, atol=1e-6, err_msg=name)


def test_rows_that_are_stored_skip_the_layers_below(bench, tmp_path):
    plan = (F, F, T, T)
    plain = bench.step(plan)
    with HiddenCache(tmp_path, lengths=None, limit_bytes=10**6) as cache:
        bench.step(plan, rows=2, hidden=cache.of(np.array([0, 1]), {}))
        assert bench.blocks.count("forward") == 2
        some = bench.step(plan, hidden=cache.of(np.array([0, 1, 2]), {}))
        assert bench.blocks.count("forward") == 2  # row 2 is new
        every = bench.step(plan, hidden=cache.of(np.array([0, 1, 2]), {}))
        assert bench.blocks == ["forward_save"] * 2 + ["backward", "backward_lowest"]
    assert every.loss == some.loss == pytest.approx(plain.loss, abs=1e-3)


def test_a_graph_of_before_that_asks_labels_for_their_size_gets_zeros(word_artifact):
    artifact = open_artifact(word_artifact)
    graph, labels = artifact.manifest.head.graphs["predict"], Port("labels", "batch", "int64", ("batch",), 2)
    head = replace(artifact.manifest.head, graphs={"predict": replace(graph, inputs=(*graph.inputs, labels))})
    older = dataclasses.replace(artifact, manifest=replace(artifact.manifest, head=head))
    real, given = onnx_loader(1, "cpu"), []

    def opened(path, threads):
        graph = real.open(path, threads)
        run = graph.run
        graph.run = lambda feeds, wanted: (given.append(feeds.pop("labels", None)), run(feeds, wanted))[1]
        return graph

    batch = draw_batch(artifact.manifest, 3, 6)
    del batch["labels"]
    weights = FrozenWeights(older, real.value_of).of_step(noisy_adapter(older), streamed=False)
    answers = Chain(older, real._replace(open=opened), threads=1).predict(
        batch, weights, lambda hidden: hidden
    )
    assert np.array_equal(real.array_of(given[-1]), np.zeros(3, np.int64))
    assert np.array_equal(
        answers, Chain(artifact, real, threads=1).predict(batch, weights, lambda hidden: hidden)
    )


def test_a_graph_is_opened_once_and_only_when_it_is_needed(word_artifact):
    bench = Bench(word_artifact)
    assert not bench.chain.opened
    for _ in range(2):
        bench.step((F, F, F, T))
    assert {Path(file).stem for file in bench.chain.opened} == {
        "prelude.forward",
        "block0.forward",
        "block0.forward_save",
        "block0.backward_lowest",
        "head.train",
    }
    bench.chain.close()
    assert not bench.chain.opened
