"""What is noted of an engine's calls, the kinds of steps, and the model of a hidden cache beside the real one."""

from functools import partial

import msgspec
import numpy as np
import pytest
from simulated import TINY
from tiny import draw_batch

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.toolkit.simulation.calls import CacheModel, Call, StepKind, WatchedEngine

D, F, T, B, R = Mode.DROP, Mode.FORWARD, Mode.TRAIN, Mode.BYPASS, Mode.BARE


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(TINY)


@pytest.fixture
def engine(artifact):
    with open_engine(artifact, threads=1) as engine:
        yield WatchedEngine(engine)


@pytest.mark.parametrize(
    ("plan", "cache_below", "key"),
    [
        ((T, T, T, T), -1, "trained 4"),
        ((F, F, T, T), -1, "below 2, trained 2"),
        ((F, F, T, T), 1, "below 1, between 1, trained 2"),
        ((D, T, B, T), -1, "trained 2, around 1"),
        ((T, R, D, F), -1, "trained 1, passed 2, bare 1"),
        ((D, D, D, D), -1, "head alone"),
    ],
)
def test_a_kind_of_step_counts_its_layers(artifact, plan, cache_below, key):
    call = Call(4, 32, plan=tuple(map(int, plan)), cache_below=cache_below)
    assert StepKind.of(call, artifact.manifest).key == key


def test_rows_that_pass_by_are_counted_in_halves_of_a_layer(artifact, engine):
    batch = draw_batch(artifact.manifest, 4, 8)
    gates = np.ones((4, 4), np.bool_)
    gates[1, :2] = gates[2, 0] = False
    engine.step(batch, (T,) * 4, artifact.adapter(), gates=gates)
    assert np.array_equal(engine.calls[0].open_rows(), gates)
    assert StepKind.of(engine.calls[0], artifact.manifest).saved_by_gates == 1.0  # 0.75 of a layer


def test_a_watched_engine_notes_sizes_and_changes_nothing(artifact, engine):
    batch, adapter = draw_batch(artifact.manifest, 3, 16), artifact.adapter()
    plain = engine._engine.step(batch, (F, F, T, T), adapter)
    assert engine.step(batch, (F, F, T, T), adapter).loss == plain.loss
    engine.evaluate(batch, adapter)
    engine.predict(batch, adapter)
    assert [(call.rows, call.tokens, call.is_step) for call in engine.calls] == [
        (3, 48, True),
        (3, 48, False),
        (3, 48, False),
    ]


def test_the_model_finds_what_the_real_cache_finds(artifact, engine, tmp_path):
    rng, lengths, adapter = np.random.default_rng(0), np.full(12, 8), artifact.adapter()
    width, found = artifact.manifest.hidden_size, []
    room = 7 * 8 * 2 * width  # seven examples
    model = CacheModel(limit_bytes=room, width=width)
    with HiddenCache(tmp_path, lengths=lengths, limit_bytes=room) as cache:
        for plan in [(F, F, T, T)] * 4 + [(F, T, T, T)] * 3 + [(F, F, T, T)]:
            examples = rng.permutation(12)[:4]
            # Of another plan the cache is emptied: then nothing is found.
            kept = set(cache._places) if not found or plan == found[-1][0] else set()
            found.append((plan, len(kept & set(examples.tolist())) / 4))
            engine.step(
                draw_batch(artifact.manifest, 4, 8), plan, adapter, hidden=partial(cache.of, examples)
            )
    shares = [*model.hit_shares(engine.calls, lengths)]
    assert shares == [share for _, share in found]
    assert any(shares)
    model.clear()
    assert next(model.hit_shares(engine.calls[:1], lengths)) == 0


def test_the_bound_in_tokens_is_noted_of_every_call(artifact, engine):
    batch, adapter = draw_batch(artifact.manifest, 3, 16), artifact.adapter()
    bounded = MemoryPlan(micro_tokens=32)
    rows = engine.rows(3, 16, bounded._replace(saved_layers=1))
    engine.step(batch, (F, F, T, T), adapter, rows=rows)
    engine.evaluate(batch, adapter, rows=rows)
    engine.features(batch, adapter, rows=rows)
    engine.predict(batch, adapter, rows=rows)
    step, *forwards = [call.memory for call in engine.calls]
    assert step == MemoryPlan(saved_layers=1, micro_tokens=32)
    assert forwards == [bounded] * 3


def test_a_call_of_an_older_journal_is_read():
    """Its memory plan has three fields."""
    packed = msgspec.msgpack.encode([4, 64, [2, 2], 1.0, -1, b"", b"", "", [2, None, True]])
    assert msgspec.msgpack.decode(packed, type=Call).memory == MemoryPlan(2, None, True)
