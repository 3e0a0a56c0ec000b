"""A memory plan changes memory and time; the step stays what it is."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, dropping, full
from fleetune.device_runtime.contracts.texts_apart import MASK
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.batches import StepResult
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ConfigError

PLANS = {
    "full": full(4),
    "half": dropping(4, (0, 2)),
    "suffix": (Mode.FORWARD, Mode.FORWARD, Mode.TRAIN, Mode.TRAIN),
}


@pytest.fixture(scope="module")
def artifact(word_artifact) -> Artifact:
    return open_artifact(word_artifact)


def drawn(artifact: Artifact, batch: int, seq: int) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {
        row.name: [{"batch": batch, "seq": seq}[str(d)] for d in row.shape]
        for row in artifact.manifest.inputs
    }
    found = {name: rng.integers(1, 5, shape) for name, shape in shapes.items()}
    return found | {MASK: np.ones(shapes[MASK], np.int64)} if MASK in shapes else found


def step(artifact: Artifact, plan: LayerPlan, memory: MemoryPlan, *, batch: int = 7) -> StepResult:
    rng = np.random.default_rng(1)
    adapter = {
        n: a + rng.normal(size=a.shape, scale=0.1).astype(np.float32) for n, a in artifact.adapter().items()
    }
    with open_engine(artifact, threads=1, memory=memory) as stack:
        return stack.step(drawn(artifact, batch, 6), plan, adapter)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("memory", [MemoryPlan(streamed=True), MemoryPlan(saved_layers=1, streamed=True)])
def test_streaming_changes_no_bit(artifact: Artifact, plan: LayerPlan, memory: MemoryPlan) -> None:
    expected = step(artifact, plan, memory._replace(streamed=False))
    found = step(artifact, plan, memory)
    assert found.loss == expected.loss
    assert all(np.array_equal(found.grads[n], g) for n, g in expected.grads.items())
    assert found.grads.keys() == expected.grads.keys()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "memory",
    [
        RECOMPUTE,
        MemoryPlan(3),
        MemoryPlan(1),
        MemoryPlan(100),
        MemoryPlan(2, 1, True),
        MemoryPlan(0, 2),
        MemoryPlan(micro_tokens=13),
        MemoryPlan(micro_tokens=1),
        MemoryPlan(3, 1, True, 24),
    ],
)
def test_the_step_stays_what_it_is(artifact: Artifact, plan: LayerPlan, memory: MemoryPlan) -> None:
    expected, found = step(artifact, plan, SAVE_ALL), step(artifact, plan, memory)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5, atol=1e-6)
    assert found.grads.keys() == expected.grads.keys()
    for name, gradient in expected.grads.items():
        np.testing.assert_allclose(
            found.grads[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )


def test_the_upper_layers_save_and_the_lower_ones_recompute(artifact: Artifact) -> None:
    with open_engine(artifact, threads=1, memory=MemoryPlan(saved_layers=2)) as stack:
        stack.step(drawn(artifact, 2, 5), full(4), artifact.adapter())
        opened = {name.split(".")[1] for name in stack.opened if "block" in name}
    assert opened == {
        "forward",
        "forward_save",
        "backward",
        "backward_recompute",
        "backward_lowest_recompute",
    }


def test_streaming_scatters_the_tables_that_only_the_prelude_reads(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, found = artifact.manifest, []
    monkeypatch.setattr(Artifact, "scatter", lambda self, start, end: found.append((start, end)))
    batch, streamed = drawn(artifact, 2, 5), Rows(memory=MemoryPlan(streamed=True))
    with open_engine(artifact, threads=1) as engine:
        engine.step(batch, full(4), artifact.adapter())
        assert not found
        for _ in range(2):
            engine.step(batch, full(4), artifact.adapter(), rows=streamed)
    tables = [m.tensors[i] for i in m.prelude.tensors]
    assert found == [(t.offset, t.offset + t.size_bytes) for t in tables]
    tied = msgspec.structs.replace(m.head, tensors=(*m.head.tensors, *m.prelude.tensors))
    with open_engine(replace(artifact, manifest=msgspec.structs.replace(m, head=tied))) as engine:
        engine.step(batch, full(4), artifact.adapter(), rows=streamed)
    assert len(found) == len(tables)


def test_evaluation_in_parts_is_evaluation(artifact: Artifact) -> None:
    batch, adapter = drawn(artifact, 7, 6), artifact.adapter()
    found = []
    for memory in (SAVE_ALL, MemoryPlan(3), MemoryPlan(streamed=True), MemoryPlan(micro_tokens=13)):
        with open_engine(artifact, threads=1, memory=memory) as stack:
            found.append(stack.evaluate(batch, adapter))
    losses, answers = zip(*found, strict=True)
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    assert all(np.array_equal(a, answers[0]) for a in answers)


@pytest.mark.parametrize("memory", [MemoryPlan(-1), MemoryPlan(saved_layers=-2), MemoryPlan(micro_tokens=-3)])
def test_numbers_below_zero_are_refused(artifact: Artifact, memory: MemoryPlan) -> None:
    with pytest.raises(ConfigError, match=r"memory plan: .* must be at least 0, got -"):
        open_engine(artifact, memory=memory)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_parts_keep_the_bounds_and_are_as_few_as_these_allow(size: int, lanes: int) -> None:
    for micro_batch in (0, 1, 3, 9, 40):
        for micro_tokens in (0, 1, 24, 100, 1000):
            rows = MemoryPlan(micro_batch, micro_tokens=micro_tokens).together(size, 8, lanes)
            room = max(1, min(micro_batch or size, micro_tokens // 8 if micro_tokens else size, size))
            assert 1 <= rows <= room
            assert -(-size // rows) == -(-size // room)


def test_a_plan_of_before_the_bound_is_read() -> None:
    assert msgspec.convert([4, None, True], MemoryPlan) == MemoryPlan(4, None, True)
