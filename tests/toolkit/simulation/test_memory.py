"""A profile's memory is its device's budget: what does not fit is declined as a real device declines it."""

import logging
from functools import partial

import msgspec
import numpy as np
import pytest
from simulated import SECONDS, TINY, outcome, records, run, write_config
from tiny import draw_data

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TooLittleMemory
from fleetune.device_runtime.training.budget import MARGIN
from fleetune.device_runtime.training.machine import Machine
from fleetune.toolkit.simulation.calls import Call
from fleetune.toolkit.simulation.costs import Point, held
from fleetune.toolkit.simulation.memory import MemoryModel

TIGHT_MB = 87.85
"""Enough for the tiny artifact in parts, not for whole batches."""
ONE = "job.min_clients=1"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("memory"))


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(TINY)


def test_a_virtual_device_plans_as_a_real_one_of_its_budget(artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("fleetune.device_runtime.training.machine.resident_mb", lambda: 0.0)
    data, work = draw_data(artifact.manifest, 40, 32), LocalWork(steps=4, batch_size=8, seq_len=32)
    budgets = [float(mb) for mb in np.arange(87.0, 97.0, 0.5)]
    real = [planned(partial(prepared, artifact, tmp_path, data, work, mb)) for mb in budgets]
    model = MemoryModel(artifact)
    assert [planned(lambda mb=mb: model.fit(work, lambda: data, mb)[1]) for mb in budgets] == real
    assert len(set(real)) > 3
    assert SAVE_ALL in real


def prepared(artifact, folder, data, work, budget_mb):
    with Machine(artifact, Resources(threads=1, memory_budget_mb=budget_mb), folder=folder) as machine:
        machine.prepare(data, work)
        return machine.memory


def planned(make):
    """A plan, all rows together being none at a time; or why there is none."""
    try:
        memory = make()
    except TooLittleMemory as exc:
        return str(exc)
    return memory._replace(micro_batch=memory.micro_batch % 8)


def test_a_profile_that_can_do_nothing_is_told_once_and_the_others_go_on(path):
    notes = []
    run(path, "small", ONE, "profiles.slow.memory_mb=10", "clients=4", on_note=notes.append)
    assert len(notes) == 1
    assert "profile slow: 2 of 2 devices take no part: memory budget of 10 MB: the least" in notes[0]
    first, *later = records(path.parent / "small")[1:]
    outcomes = {(choice["profile"], choice["outcome"]) for choice in first["choices"]}
    assert outcomes == {("quick", "counted"), ("slow", "declined")}
    assert [{choice["profile"] for choice in line["choices"]} for line in later] == [{"quick"}] * 2


def test_the_aggregator_hears_the_cause(path, monkeypatch):
    causes = []
    kept = "fleetune.broker.store.ledger.Ledger.decline"
    monkeypatch.setattr(kept, lambda self, task, cause, reason: causes.append((cause, reason)))
    run(path, "causes", ONE, "profiles.slow.memory_mb=10", "clients=4", "rounds=1")
    assert [cause for cause, _ in causes] == ["memory"] * 2
    assert all(reason.startswith("memory budget of 10 MB") for _, reason in causes)


def test_a_fleet_that_can_do_nothing_is_refused_at_once(path):
    with pytest.raises(ConfigError, match=r"no device can do this work: profile quick: 2 of 2 .* 9 MB"):
        run(path, "none", "profiles.slow.memory_mb=9", "profiles.quick.memory_mb=9")
    with pytest.raises(ConfigError, match=r"2 of 4 devices .* memory .*; a round needs at least 3"):
        run(path, "few", "profiles.slow.memory_mb=9")


def test_a_configurator_goes_on_without_who_can_do_none_of_its_arms(path, caplog):
    notes, changes = [], (ONE, "profiles.slow.memory_mb=10", "clients=4", "job.configurator=auto")
    with caplog.at_level(logging.WARNING):
        run(path, "auto", *changes, "work.held_out=0.2", on_note=notes.append)
    told = [note for note in notes if note.startswith("profile slow: device-")]
    assert len(told) == 1
    assert "declined in round 1: memory budget of 10 MB" in told[0]
    last = records(path.parent / "auto")[-1]
    assert {choice["profile"] for choice in last["choices"] if choice["outcome"] == "counted"} == {"quick"}


def test_a_tight_budget_costs_time_and_keeps_to_itself(path):
    """A step that keeps not all that it could takes half as long again here."""
    asked = []

    def measure(sample):
        memory = sample.call.memory
        asked.append(held(memory))
        seconds = SECONDS * (1.5 if memory != SAVE_ALL else 1.0) if any(sample.call.plan) else SECONDS / 1000
        return [Point(1, seconds), Point(2, seconds)]

    tight = f"profiles.slow.memory_mb={TIGHT_MB}"
    run(path, "tight", tight, measure=measure)
    run(path, "wide", measure=measure)
    assert any(asked)
    for line, wide in zip(records(path.parent / "tight")[1:], records(path.parent / "wide")[1:], strict=True):
        for choice, plain in zip(line["choices"], wide["choices"], strict=True):
            factor = 1.5 if choice["profile"] == "slow" else 1.0
            assert choice["compute_s"] == pytest.approx(factor * plain["compute_s"])
            if choice["profile"] == "slow":
                assert choice["peak_mb"] < min(TIGHT_MB, plain["peak_mb"])
    run(path, "tight-again", tight, measure=measure, workers=2)
    assert outcome(path.parent / "tight-again") == outcome(path.parent / "tight")


BOUND = "work.micro_tokens=16"


def test_a_bound_in_tokens_lowers_the_peak_and_costs_its_own_time_and_no_accuracy(path):
    """Here what is held so takes half as long again, forwards too."""

    def measure(sample):
        factor = 1.5 if sample.call.memory.micro_tokens else 1.0
        return [Point(1, factor * SECONDS), Point(2, factor * SECONDS)]

    plain, micro = (
        run(path, name, *sets, measure=measure) for name, sets in (("unbound", ()), ("bound", (BOUND,)))
    )
    for line, other in zip(
        records(path.parent / "bound")[1:], records(path.parent / "unbound")[1:], strict=True
    ):
        for choice, whole in zip(line["choices"], other["choices"], strict=True):
            assert choice["device"] == whole["device"]
            assert choice["peak_mb"] < whole["peak_mb"]
            assert choice["compute_s"] == pytest.approx(1.5 * whole["compute_s"])
    assert micro.accuracy == pytest.approx(plain.accuracy, abs=0.02)


def test_a_bound_in_tokens_lets_a_tight_profile_keep_its_plan(artifact):
    """A device is asked for less, and plans as a real one under both."""
    data, model = draw_data(artifact.manifest, 40, 32), MemoryModel(artifact)
    work = LocalWork(steps=4, batch_size=8, seq_len=32)
    bound = msgspec.structs.replace(work, micro_tokens=64)
    assert model.fit(bound, lambda: data, 1e4)[1] == MemoryPlan(micro_tokens=64)
    tight = MARGIN * model.peak_mb([Call(8, 256, plan=(2,) * 4, memory=MemoryPlan(micro_tokens=64))]) + 0.2
    found, plain = (model.fit(some, lambda: data, tight)[1] for some in (bound, work))
    assert found == MemoryPlan(micro_tokens=64)
    assert plain not in (SAVE_ALL, found)


def test_the_peak_of_a_run_is_that_of_its_batch_that_takes_most(artifact):
    """With room for 40 tokens a row of 32 runs alone, and two of 16 and of 20 run together."""
    model, bound = MemoryModel(artifact), MemoryPlan(micro_tokens=40)
    calls = {n: Call(8, 8 * n, plan=(2,) * 4, memory=bound) for n in (16, 20, 32)}
    alone = {n: model.peak_mb([call]) for n, call in calls.items()}
    assert alone[20] > alone[32]
    assert alone[20] > alone[16]
    assert model.peak_mb([*calls.values()]) == alone[20]
