"""What of this machine a run may use: cores, a budget, a hidden cache; through `train`, as a user meets it."""

import errno
import logging
import os
from functools import partial

import msgspec
import numpy as np
import pytest
from flat import train

from fleetune.device_runtime import arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.training.machine import Machine, Resources, pin

OPTIONS = {"batch_size": 16, "seq_len": 16, "steps": 9, "threads": 1}


@pytest.fixture
def affinity():
    """The cores of this test's process, put back afterwards."""
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system pins no process")
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def test_a_process_is_pinned_to_the_cores_named(affinity) -> None:
    first = min(affinity)
    assert pin(f"{first}") == 1
    assert os.sched_getaffinity(0) == {first}


@pytest.mark.parametrize(
    ("cores", "words"),
    [
        ("a-b", "expected numbers and ranges, as 0-3,6"),
        ("3-1", "expected numbers and ranges"),
        ("", "expected numbers and ranges"),
        ("4000", r"no core 4000; have: \["),
    ],
)
def test_cores_that_are_none_are_refused(affinity, cores, words) -> None:
    with pytest.raises(ConfigError, match=words):
        pin(cores)


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(memory_budget_mb=-1), "memory_budget_mb must be at least 0, got -1"),
        (Resources(hidden_cache_mb=-2), "hidden_cache_mb must be at least 0, got -2"),
        (Resources(memory_budget_mb=500, recompute=True), "the budget chooses both"),
        (Resources(memory_budget_mb=500, stream=True), "the budget chooses both"),
    ],
)
def test_what_contradicts_itself_is_refused(word_artifact, tmp_path, resources, words) -> None:
    with pytest.raises(ConfigError, match=words):
        Machine(open_artifact(word_artifact), resources, folder=tmp_path)


def test_a_budget_is_told_and_reported(word_artifact, word_file, tmp_path) -> None:
    told = []
    report = train(
        word_artifact, data=word_file, out=tmp_path, memory_budget_mb=5000, on_note=told.append, **OPTIONS
    )
    assert report.memory_plan == {
        "micro_batch": 16,
        "saved_layers": None,
        "streamed": False,
        "micro_tokens": 0,
    }
    (fit,) = told
    assert str(fit).startswith(
        "16 rows at a time, all activations kept, weights resident, at most 4 layers active: "
    )
    assert fit.expected_mb < 5000


def test_a_budget_that_nothing_fits_is_refused_with_the_least(word_artifact, word_file, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"memory budget of 9 MB: the least that would do is \d+ MB"):
        train(word_artifact, data=word_file, out=tmp_path, memory_budget_mb=9, **OPTIONS)


def test_a_budget_holds_for_an_evaluation_too(word_artifact, word_file, tmp_path) -> None:
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    with Machine(artifact, Resources(threads=1, memory_budget_mb=5000), folder=tmp_path) as machine:
        work = LocalWork(batch_size=8, policy=PolicySpec(name="exact-k", drop=0.5))
        assert machine.prepare(data, work) == work
        assert machine.memory == MemoryPlan(micro_batch=8)
        asked = []
        real = machine.engine.evaluate
        machine.engine.evaluate = lambda *batch, rows: (asked.append(rows), real(*batch, rows=rows))[1]
        assert machine.evaluate(data, artifact.adapter()).num_samples == 120
        assert {rows.memory for rows in asked} == {machine.memory}


def test_a_budget_holds_for_the_steps_of_its_run_whatever_is_fitted_next(
    word_artifact, word_file, tmp_path, monkeypatch
) -> None:
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    asked = []
    with Machine(artifact, Resources(threads=1, memory_budget_mb=5000), folder=tmp_path) as machine:
        real = machine.engine.step
        machine.engine.step = lambda *batch, **more: (
            asked.append(more["rows"].memory.micro_batch),
            real(*batch, **more),
        )[1]
        trainers = [
            machine.trainer(data, LocalWork(batch_size=size, seq_len=16), artifact.adapter())
            for size in (8, 16)
        ]
        for trainer in trainers:
            trainer.step()
    assert asked == [8, 16]


def test_a_later_round_fits_as_the_first_though_the_process_has_grown(
    word_artifact, word_file, tmp_path, monkeypatch
) -> None:
    held = iter((80.0, 4000.0))
    monkeypatch.setattr("fleetune.device_runtime.training.machine.resident_mb", lambda: next(held))
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    with Machine(artifact, Resources(threads=1, memory_budget_mb=500), folder=tmp_path) as machine:
        machine.prepare(data, LocalWork(batch_size=8))
        first = machine.fit
        machine.prepare(data, LocalWork(batch_size=8))
        assert machine.fit == first


def test_the_hidden_cache_is_gone_after_the_run(word_artifact, word_file, tmp_path) -> None:
    suffix = {**OPTIONS, "steps": 0, "epochs": 2, "policy": "suffix", "drop": 0.5}
    plain = train(word_artifact, data=word_file, out=tmp_path / "plain", **suffix)
    cached = train(word_artifact, data=word_file, out=tmp_path / "cached", hidden_cache_mb=50, **suffix)
    np.testing.assert_allclose(cached.losses, plain.losses, atol=2e-3)
    assert cached.losses != plain.losses  # it went through fp16
    assert not list((tmp_path / "cached" / "cache").iterdir())


def test_a_run_with_a_hidden_cache_that_was_killed_goes_on_as_the_one_that_was_not(
    word_artifact, word_file, tmp_path
) -> None:
    class Killed(BaseException):
        pass

    def kill(report) -> None:
        if report.step == 11:
            raise Killed

    suffix = {**OPTIONS, "steps": 20, "policy": "suffix", "drop": 0.5, "hidden_cache_mb": 50}
    straight = train(word_artifact, data=word_file, out=tmp_path / "a", checkpoint_every=4, **suffix)
    with pytest.raises(Killed):
        train(word_artifact, data=word_file, out=tmp_path / "b", checkpoint_every=4, on_step=kill, **suffix)
    resumed = train(word_artifact, data=word_file, out=tmp_path / "b", checkpoint_every=4, **suffix)
    np.testing.assert_allclose(resumed.losses, straight.losses, atol=1e-5)


def test_a_full_disk_under_the_checkpoint_does_not_end_the_run(
    word_artifact, word_file, tmp_path, monkeypatch, caplog
) -> None:
    real, checkpoint = os.fsync, tmp_path / "run" / "checkpoint.safetensors"
    whole = []

    def full_disk(handle: int) -> None:
        name = os.readlink(f"/proc/self/fd/{handle}")
        if "checkpoint" in name and checkpoint.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    def on_step(report) -> None:
        if checkpoint.exists():
            whole.append(checkpoint.read_bytes())

    monkeypatch.setattr(arrays.os, "fsync", full_disk)
    with caplog.at_level(logging.WARNING):
        report = train(
            word_artifact,
            data=word_file,
            out=tmp_path / "run",
            checkpoint_every=3,
            on_step=on_step,
            **OPTIONS,
        )
    assert report.steps == 9
    assert len(set(whole)) == 1, "the first checkpoint stays, whole"
    assert "no checkpoint: " in caplog.text
    assert "No space left on device; the one before stays" in caplog.text
    assert not list((tmp_path / "run").glob(".*.part"))


def test_the_memory_that_a_run_expects_is_told_with_or_without_a_budget(
    word_artifact, word_file, tmp_path
) -> None:
    artifact = open_artifact(word_artifact)
    dataset = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)

    def told(resources: Resources, **policy: object) -> float:
        work = LocalWork(steps=1, seq_len=16, policy=PolicySpec(**policy))
        with Machine(artifact, resources, folder=tmp_path / "cache") as machine:
            stats = machine.trainer(dataset, work, artifact.adapter()).stats
            assert not machine.fit or stats["peak_mb"] == machine.fit.expected_mb
            return stats["peak_mb"]

    assert told(Resources(memory_budget_mb=4000)) > 50
    whole = told(Resources())
    assert 50 < told(Resources(), name="suffix", drop=0.9) < whole


def noted(call, asked, *some, rows, **more):
    asked.append(rows.memory)
    return call(*some, rows=rows, **more)


def test_work_bounds_what_runs_at_a_time_in_steps_and_measurements(
    word_artifact, word_file, tmp_path, monkeypatch
) -> None:
    artifact = open_artifact(word_artifact)
    data = load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)
    asked: list[MemoryPlan] = []
    with Machine(artifact, Resources(threads=1, stream=True), folder=tmp_path) as machine:
        for name in ("step", "evaluate", "features"):
            monkeypatch.setattr(machine.engine, name, partial(noted, getattr(machine.engine, name), asked))
        work = LocalWork(steps=1, batch_size=8, seq_len=16, micro_tokens=48, held_out=0.2)
        plain = machine.trainer(data, msgspec.structs.replace(work, micro_tokens=0), artifact.adapter())
        assert machine.memory == MemoryPlan(streamed=True)
        trainer = machine.trainer(data, work, artifact.adapter())
        trainer.step()
        machine.evaluate(data, artifact.adapter())
        machine.class_sums(data, work, artifact.adapter())
        assert set(asked) == {MemoryPlan(streamed=True, micro_tokens=48)} == {machine.memory}
        assert trainer.stats["peak_mb"] < plain.stats["peak_mb"]


def test_a_budget_and_a_bound_in_tokens_hold_both(word_artifact, word_file, tmp_path) -> None:
    told = []
    report = train(
        word_artifact,
        data=word_file,
        out=tmp_path,
        memory_budget_mb=5000,
        on_note=told.append,
        **OPTIONS,
        micro_tokens=48,
    )
    assert report.memory_plan == {
        "micro_batch": 16,
        "saved_layers": None,
        "streamed": False,
        "micro_tokens": 48,
    }
    assert str(told[0]).startswith("16 rows of at most 48 tokens at a time, ")


def test_a_run_in_micro_batches_learns_as_the_whole_and_killed_goes_on_to_the_bit(
    word_artifact, word_file, tmp_path
) -> None:
    class Killed(BaseException):
        pass

    def kill(report) -> None:
        if report.step == 6:
            raise Killed

    run = {"data": word_file, "checkpoint_every": 4, **OPTIONS}
    plain = train(word_artifact, out=tmp_path / "plain", **run)
    straight = train(word_artifact, out=tmp_path / "a", micro_tokens=48, **run)
    np.testing.assert_allclose(straight.losses, plain.losses, atol=1e-4)
    assert straight.losses != plain.losses
    with pytest.raises(Killed):
        train(word_artifact, out=tmp_path / "b", micro_tokens=48, on_step=kill, **run)
    with pytest.raises(ConfigError, match="micro_tokens"):
        train(word_artifact, out=tmp_path / "b", micro_tokens=64, **run)
    resumed = train(word_artifact, out=tmp_path / "b", micro_tokens=48, **run)
    assert resumed.losses == straight.losses
    adapters = [(tmp_path / d / "adapter" / "adapter_model.safetensors").read_bytes() for d in "ab"]
    assert adapters[0] == adapters[1]


@pytest.mark.parametrize("resources", [{}, {"memory_budget_mb": 5000}])
@pytest.mark.parametrize(
    ("bad", "words"),
    [(-1, "at least 0, got -1"), (2**31, "at most 2147483647"), (float("nan"), "int"), (1e300, "int")],
)
def test_a_bound_that_is_none_is_refused_in_a_line(
    word_artifact, word_file, tmp_path, bad, words, resources
) -> None:
    with pytest.raises(ConfigError, match=f"^micro_tokens .*{words}[^\n]*$"):
        train(word_artifact, data=word_file, out=tmp_path, **OPTIONS, **resources, micro_tokens=bad)
