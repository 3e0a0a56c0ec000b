"""Layers that the gradient goes around, rows that pass a layer by, and a boundary below the lowest trained layer."""

from functools import partial

import numpy as np
import pytest
from tiny import draw_batch, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, dropping, full, route
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.footprint import footprint
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ConfigError

D, F, T, Y = Mode.DROP, Mode.FORWARD, Mode.TRAIN, Mode.BYPASS
ROWS = [Rows(1), Rows(2), Rows(1, MemoryPlan(2)), Rows(2, RECOMPUTE)]


@pytest.fixture(scope="module")
def artifact(word_artifact):
    return open_artifact(word_artifact)


@pytest.fixture(scope="module")
def adapter(artifact):
    return noisy_adapter(artifact)


@pytest.fixture(scope="module")
def engine(artifact):
    with open_engine(artifact, threads=2) as engine:
        yield engine


def alike(found, expected):
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        np.testing.assert_allclose(found.grads[name], grad, rtol=1e-4, atol=2e-6, err_msg=name)


def of_layers(grads, *layers):
    return {n: g for n, g in grads.items() if n.startswith(tuple(f"blocks.{i}." for i in layers))}


def test_a_bypassed_layer_runs_and_what_lies_above_learns_as_ever(artifact, adapter, engine):
    batch = draw_batch(artifact.manifest, 6, 8)
    whole, around = engine.step(batch, full(4), adapter), engine.step(batch, (T, Y, Y, T), adapter)
    assert around.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, grad in of_layers(whole.grads, 3).items():
        np.testing.assert_allclose(around.grads[name], grad, rtol=1e-5, atol=1e-7)
    assert not of_layers(around.grads, 1, 2)
    assert any(np.abs(g - whole.grads[n]).max() > 1e-5 for n, g in of_layers(around.grads, 0).items())


def test_a_gradient_goes_around_a_layer_unchanged(artifact, adapter, engine):
    """Of a block whose adapter and matrices add nothing, around and through are the same; so is below the lowest trained."""
    batch = draw_batch(artifact.manifest, 6, 8)
    alike(engine.step(batch, (Y, F, T, T), adapter), engine.step(batch, (F, F, T, T), adapter))
    assert route((T, Y, T, Y)).back == (0, 2)
    assert route((T, Y, T, Y), RECOMPUTE).rerun == (0, 2)


def test_a_bypassed_layer_keeps_nothing(artifact):
    def saved(plan):
        return footprint(artifact, plan, batch_size=8, seq_len=16).saved

    assert saved((T, Y, Y, T)) == pytest.approx(saved(full(4)) / 2, rel=1e-6)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_pass_a_layer_by_are_as_if_it_were_dropped_for_them(artifact, adapter, engine, rows):
    """The right value is the mean of two steps: of the rows that run through layer 1, and of those for which it is not there."""
    batch = draw_batch(artifact.manifest, 8, 8)
    gates = np.ones((4, 8), bool)
    gates[1, [1, 4, 6, 7]] = False
    found = engine.step(batch, full(4), adapter, rows=rows, gates=gates)
    halves = [
        engine.step({n: a[mine] for n, a in batch.items()}, plan, adapter, rows=Rows(1))
        for mine, plan in ((gates[1], full(4)), (~gates[1], dropping(4, (1,))))
    ]
    assert found.loss == pytest.approx(np.mean([half.loss for half in halves]), rel=1e-5)
    for name, grad in found.grads.items():
        expected = sum(half.grads.get(name, np.zeros_like(grad)) for half in halves) / 2
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=2e-6, err_msg=name)


def test_open_gates_are_no_gates_and_shut_ones_drop_the_layer(artifact, adapter, engine):
    batch = draw_batch(artifact.manifest, 4, 8)
    gates = np.ones((4, 4), bool)
    alike(engine.step(batch, full(4), adapter, gates=gates), engine.step(batch, full(4), adapter))
    gates[[0, 2]] = False
    alike(engine.step(batch, full(4), adapter, gates=gates), engine.step(batch, (D, T, D, T), adapter))


@pytest.mark.parametrize("gates", [np.ones((4, 3), bool), np.ones((3, 4), bool), np.ones((4, 4))])
def test_gates_of_another_shape_are_refused(artifact, adapter, engine, gates):
    with pytest.raises(ConfigError, match=r"gates: expected bool\[4, 4\], got"):
        engine.step(draw_batch(artifact.manifest, 4, 8), full(4), adapter, gates=gates)


@pytest.mark.parametrize("gated", [False, True])
def test_a_boundary_below_the_trained_layers_keeps_what_others_may_change(
    artifact, adapter, engine, tmp_path, gated
):
    """Layer 2 runs frozen here and learns elsewhere: what is stored flows into layer 1, or lower still where rows pass by."""
    batch, examples = draw_batch(artifact.manifest, 4, 8), np.arange(4)
    gates = np.array([[1] * 4, [1] * 4, [1, 0, 1, 0], [1] * 4], bool) if gated else None
    plan, given = (F, F, F, T), {"gates": gates, "cache_below": 1}
    other = {n: a + 0.1 * (".2." in n) for n, a in adapter.items()}
    with HiddenCache(tmp_path, lengths=None, limit_bytes=10**6) as cache:
        for version in (adapter, other):
            kept = engine.step(batch, plan, version, hidden=partial(cache.of, examples), **given)
            expected = engine.step(batch, plan, version, gates=gates)
            assert kept.loss == pytest.approx(expected.loss, abs=2e-3)
        size = cache.size_bytes
        engine.step(batch, plan, adapter, hidden=partial(cache.of, examples), **given)
        assert cache.size_bytes == size > 0  # nothing was made anew
    assert route(plan, cache_below=1).below == (0,)
    assert route(plan, cache_below=4).below == (0, 1, 2)


def test_with_only_the_head_to_train_every_layer_lies_below(artifact, adapter, engine, tmp_path):
    batch, examples = draw_batch(artifact.manifest, 4, 8), np.arange(4)
    with HiddenCache(tmp_path, lengths=None, limit_bytes=10**6) as cache:
        found = [engine.step(batch, (F,) * 4, adapter, hidden=partial(cache.of, examples)) for _ in range(2)]
        assert cache.size_bytes
    for step in found:
        assert step.grads.keys() == {"head.weight", "head.bias"}
        assert step.loss == pytest.approx(engine.step(batch, (F,) * 4, adapter).loss, abs=2e-3)


def test_a_layer_without_lora_cannot_be_bare(artifact, adapter, engine):
    with pytest.raises(ConfigError, match=r"layer 1 has no LoRA to switch off"):
        engine.step(draw_batch(artifact.manifest, 4, 8), (T, Mode.BARE, T, T), adapter)
