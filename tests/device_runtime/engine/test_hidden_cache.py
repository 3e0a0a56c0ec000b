"""The hidden cache: what is stored comes back, what is stale does not; a run with it is the run without, up to fp16."""

import errno
import logging
import os

import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.training.trainer import Trainer

LENGTHS = np.array([2, 5, 3, 1])
BELOW = {"lora": np.ones(3, np.float32)}
PLENTY = 10**9


@pytest.fixture
def cache(tmp_path):
    with HiddenCache(tmp_path / "cache", lengths=LENGTHS, limit_bytes=PLENTY) as opened:
        yield opened


def hidden(rows: int, seq: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, seq, 4)).astype(np.float32)


def test_rows_come_back_as_fp16_without_their_padding(cache) -> None:
    examples, given = np.array([1, 3, 0]), hidden(3)
    used = cache.of(examples, BELOW).store(np.array([True, True, True]), given)
    np.testing.assert_array_equal(used, given.astype(np.float16).astype(np.float32))
    found, missing = cache.of(np.array([0, 2, 1]), BELOW).load((3, 8, 4))
    assert missing.tolist() == [False, True, False]
    np.testing.assert_array_equal(found[0, :2], used[2, :2])
    np.testing.assert_array_equal(found[2, :5], used[0, :5])
    assert not found[0, 2:].any()
    assert not found[1].any()
    assert cache.size_bytes == 2 * 4 * (5 + 1 + 2)


def test_a_part_of_a_batch_is_its_own_rows(cache) -> None:
    part = cache.of(np.array([0, 1, 2]), BELOW).some(slice(1, 3))
    part.store(np.array([False, True]), hidden(1))
    assert cache.of(np.array([0, 1, 2]), BELOW).load((3, 6, 4))[1].tolist() == [True, True, False]


def test_another_adapter_below_empties_it(cache) -> None:
    cache.of(np.array([0]), BELOW).store(np.array([True]), hidden(1))
    same = {"lora": BELOW["lora"].copy()}
    assert not cache.of(np.array([0]), same).load((1, 6, 4))[1].any()
    other = {"lora": np.zeros(3, np.float32)}
    assert cache.of(np.array([0]), other).load((1, 6, 4))[1].all()
    assert cache.size_bytes == 0


def test_it_keeps_within_its_limit(tmp_path) -> None:
    with HiddenCache(tmp_path, lengths=None, limit_bytes=100) as cache:
        cache.of(np.arange(4), BELOW).store(np.ones(4, bool), hidden(4))
        assert cache.size_bytes == 96
        assert cache.of(np.arange(4), BELOW).load((4, 6, 4))[1].tolist() == [False, False, True, True]
    assert not any(tmp_path.iterdir())


def test_what_an_earlier_run_left_is_thrown_away(tmp_path) -> None:
    for name in ("hidden.f16", "prefix.f16"):  # the latter by version 0.1.0
        (tmp_path / name).write_bytes(bytes(100))
    with HiddenCache(tmp_path, lengths=None, limit_bytes=100) as cache:
        assert cache.of(np.arange(1), BELOW).load((1, 6, 4))[1].all()
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_a_full_disk_ends_the_storing_only(cache, monkeypatch, caplog) -> None:
    def full_disk(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full_disk)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            used = cache.of(np.array([0]), BELOW).store(np.array([True]), hidden(1))
    assert used.shape == (1, 6, 4)
    assert [r.message for r in caplog.records if "No space left" in r.message] == [caplog.records[0].message]
    assert cache.of(np.array([0]), BELOW).load((1, 6, 4))[1].all()


def test_a_stream_beyond_fp16_is_refused_with_its_size(cache) -> None:
    with pytest.raises(ConfigError, match=r"reaches 1e\+05, beyond fp16"):
        cache.of(np.array([0]), BELOW).store(np.array([True]), np.full((1, 6, 4), 1e5, np.float32))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"hidden cache in .*file"):
        HiddenCache(tmp_path / "file", lengths=None, limit_bytes=1)


SUFFIX = PolicySpec(name="suffix", drop=0.5)
EPOCH = 8
"""Steps of an epoch."""


def run(
    word_artifact,
    word_file,
    folder,
    *,
    limit_bytes=PLENTY,
    memory=SAVE_ALL,
    policy=SUFFIX,
    epochs=3,
    lr=2e-3,
    cached=True,
):
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    optimizer = OptimizerSpec(lr=lr)
    work = LocalWork(policy=policy, optimizer=optimizer, epochs=epochs, batch_size=16, seq_len=16)
    with (
        open_engine(artifact, threads=1, memory=memory) as stack,
        HiddenCache(folder, lengths=data.lengths, limit_bytes=limit_bytes) as cache,
    ):
        ran = []
        chain = stack._chain(1)
        real = chain._rise
        chain._rise = lambda rows, layers: (ran.append(list(layers)), real(rows, layers))[1]
        trainer = Trainer(stack, data, work, artifact.adapter(), hidden=cache if cached else None)
        while not trainer.done:
            trainer.step()
    return trainer, ran


def test_a_run_with_it_is_the_run_without_up_to_fp16(word_artifact, word_file, tmp_path) -> None:
    plain, _ = run(word_artifact, word_file, tmp_path / "a", cached=False)
    cached, ran = run(word_artifact, word_file, tmp_path / "b")
    np.testing.assert_allclose(
        [r.loss for r in cached.history], [r.loss for r in plain.history], atol=2e-3, rtol=0
    )
    below = [layers for layers in ran if layers == [0, 1]]
    assert len(below) == len(plain.history) / 3  # in the first of three epochs only


@pytest.mark.parametrize("changes", [{"limit_bytes": 4000}, {"memory": MemoryPlan(5)}, {"limit_bytes": 0}])
def test_what_is_found_changes_nothing(word_artifact, word_file, tmp_path, changes) -> None:
    expected, _ = run(word_artifact, word_file, tmp_path / "a")
    found, _ = run(word_artifact, word_file, tmp_path / "b", **changes)
    np.testing.assert_allclose([r.loss for r in found.history], [r.loss for r in expected.history], atol=2e-4)


def test_full_depth_has_no_prefix(word_artifact, word_file, tmp_path) -> None:
    _, ran = run(word_artifact, word_file, tmp_path, policy=PolicySpec(name="suffix"))
    assert all(layers == [0, 1, 2, 3] for layers in ran)


NEAR = 5e-4
"""fp16 changes a loss by at most 6e-5 here; a hidden stream of before its layers were trained, by 3e-2."""


def moving(name: str, *, drop: float = 0.5, period: int = 2 * EPOCH) -> PolicySpec:
    return PolicySpec(name=name, drop=drop, period=period)


@pytest.mark.parametrize(("name", "filled", "above"), [("successive", 1, 6), ("cyclic", 2, 4)])
def test_it_is_used_while_a_block_stays_and_filled_anew_when_what_lies_below_was_trained(
    word_artifact, word_file, tmp_path, name, filled, above
) -> None:
    """Eight epochs: layers 0 and 1 for two, then 2 and 3; ``cyclic`` comes to each block twice. Counted in epochs."""
    changes = {"policy": moving(name), "epochs": 8, "lr": 0.02}
    plain, _ = run(word_artifact, word_file, tmp_path / "a", cached=False, **changes)
    cached, ran = run(word_artifact, word_file, tmp_path / "b", **changes)
    assert largest_difference(cached, plain) < NEAR
    assert ran.count([0, 1]) == filled * EPOCH
    assert ran.count([2, 3]) == above * EPOCH
    assert ran.count([0, 1, 2, 3]) == (8 - above) * EPOCH


def test_the_prefix_of_successive_grows(word_artifact, word_file, tmp_path) -> None:
    policy = moving("successive", drop=0.75)
    plain, _ = run(word_artifact, word_file, tmp_path / "a", policy=policy, epochs=8, lr=0.02, cached=False)
    cached, ran = run(word_artifact, word_file, tmp_path / "b", policy=policy, epochs=8, lr=0.02)
    assert largest_difference(cached, plain) < NEAR
    assert [ran.count(list(range(n))) for n in (1, 2, 3)] == [EPOCH] * 3
    assert [ran.count(list(range(n, 4))) for n in (0, 1, 2, 3)] == [2 * EPOCH] * 4


def test_what_lies_below_the_width_is_kept_whichever_layer_above_trains(
    word_artifact, word_file, tmp_path
) -> None:
    """One of the upper two trains in a step, and often the upper: the boundary stays below both."""
    policy = PolicySpec(name="dropbp", drop=0.5, width=2)
    plain, _ = run(word_artifact, word_file, tmp_path / "a", policy=policy, lr=0.02, cached=False)
    cached, ran = run(word_artifact, word_file, tmp_path / "b", policy=policy, lr=0.02)
    assert largest_difference(cached, plain) < NEAR
    assert (ran.count([0, 1]), ran.count([2, 3]), len(ran)) == (EPOCH, 3 * EPOCH, 4 * EPOCH)


def test_a_suffix_that_grows_fills_it_anew(word_artifact, word_file, tmp_path) -> None:
    changes = {"policy": PolicySpec(name="growing", period=2 * EPOCH, width=2), "epochs": 4, "lr": 0.02}
    plain, _ = run(word_artifact, word_file, tmp_path / "a", cached=False, **changes)
    cached, ran = run(word_artifact, word_file, tmp_path / "b", **changes)
    assert largest_difference(cached, plain) < NEAR
    assert [ran.count(layers) for layers in ([0, 1], [2, 3], [0, 1, 2, 3])] == [EPOCH, 2 * EPOCH, 2 * EPOCH]


@pytest.mark.parametrize("period", [3, EPOCH + 3])
def test_a_period_that_is_no_epoch_gives_nothing_stale(word_artifact, word_file, tmp_path, period) -> None:
    changes = {"policy": moving("cyclic", drop=0.75, period=period), "epochs": 6, "lr": 0.02}
    plain, _ = run(word_artifact, word_file, tmp_path / "a", cached=False, **changes)
    cached, _ = run(word_artifact, word_file, tmp_path / "b", **changes)
    assert largest_difference(cached, plain) < NEAR


def test_a_cache_that_forgot_nothing_would_be_seen(word_artifact, word_file, tmp_path, monkeypatch) -> None:
    """So the tests above can fail."""
    changes = {"policy": moving("cyclic"), "epochs": 8, "lr": 0.02}
    plain, _ = run(word_artifact, word_file, tmp_path / "a", cached=False, **changes)
    monkeypatch.setattr(HiddenCache, "_keep_only", lambda cache, below: None)
    stale, _ = run(word_artifact, word_file, tmp_path / "b", **changes)
    assert largest_difference(stale, plain) > 10 * NEAR


def largest_difference(one: Trainer, other: Trainer) -> float:
    """Of the losses."""
    found = [abs(a.loss - b.loss) for a, b in zip(one.history, other.history, strict=True)]
    return max(found)


def test_where_the_head_alone_learns_every_layer_is_passed_once(word_artifact, word_file, tmp_path) -> None:
    policy = PolicySpec(name="head")
    plain, ran = run(word_artifact, word_file, tmp_path / "a", policy=policy, lr=0.02, cached=False)
    cached, ran = run(word_artifact, word_file, tmp_path / "b", policy=policy, lr=0.02)
    assert [layers for layers in ran if layers] == [[0, 1, 2, 3]] * (len(plain.history) // 3)
    losses = [report.loss for report in cached.history]
    np.testing.assert_allclose(losses, [r.loss for r in plain.history], atol=2e-3, rtol=0)
    start = open_artifact(word_artifact).adapter()
    learned = {n for n, value in cached.adapter.items() if value.tobytes() != start[n].tobytes()}
    assert learned == {"head.weight", "head.bias"}
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_a_model_whose_head_is_frozen_cannot_train_the_head_alone(word_artifact, word_file, tmp_path) -> None:
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    work = LocalWork(policy=PolicySpec(name="head"), steps=1, seq_len=16)
    with open_engine(artifact, threads=1) as stack:
        trainer = Trainer(stack, data, work, artifact.adapter())
        step = stack.step
        trainer._engine.step = lambda *rest, **named: step(*rest, **named)._replace(grads={})
        with pytest.raises(
            ConfigError, match="policy 'head' trains the head alone, and this model's is frozen"
        ):
            trainer.step()
    assert trainer.step_index == 0


def test_rows_that_are_cut_off_the_file_are_missing(cache, tmp_path) -> None:
    cache.of(np.array([1, 3]), BELOW).store(np.array([True, True]), hidden(2))
    os.truncate(tmp_path / "cache" / "hidden.f16", 2 * 4 * 5)
    _, missing = cache.of(np.array([1, 3]), BELOW).load((2, 8, 4))
    assert missing.tolist() == [False, True]
