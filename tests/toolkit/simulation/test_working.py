"""What a device computes, waits and pauses: each second once, in the round in which it passes."""

import pytest
from simulated import SECONDS, constant, devices, records, run, write_config

from fleetune.toolkit.simulation.availability import Interruption
from fleetune.toolkit.simulation.jobs import Done
from fleetune.toolkit.simulation.virtual_run import Account, VirtualRun
from fleetune.toolkit.simulation.working import Working

STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("working"))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def made(clock, *, pause=None, rest=2.0):
    """A run of four steps of a second, and ``rest``."""
    account = Account([1.0] * 4, rest, 0.0)
    return VirtualRun({}, wait=Done, account=lambda _: account, clock=clock, least_s=0.0, pause=pause)


def test_a_pause_comes_in_its_place(path):
    run_ = made(Clock(), pause=Interruption(0.5, 10.0))  # after 3 of 6 seconds
    assert run_.ends_at == 116.0
    times = (102.5, 103.0, 109.0, 113.0, 114.5, 200.0)
    assert [run_.steps_by(now) for now in times] == [2, 3, 3, 3, 4, 4]
    assert [run_.compute_s(now) for now in times] == [2.5, 3.0, 3.0, 3.0, 4.5, 6.0]


def test_a_second_counts_once():
    clock, working = Clock(), Working()
    working.begin(made(clock), 100.0)
    assert [working.take(now) for now in (102.0, 102.0, 105.0)] == [2.0, 0.0, 3.0]
    working.add(0.5)
    clock.now = 105.5
    working.begin(made(clock), 105.5)
    assert working.take(106.5) == 0.5 + 0.5 + 1.0
    working.stop(107.0)
    assert [working.take(now) for now in (200.0, 300.0)] == [0.5, 0.0]


def test_who_waits_in_a_round_takes_its_idle_watts(path):
    run(path, "idle", "profiles.quick.idle_w=0.5", "profiles.slow.idle_w=0.5")
    before, line = records(path.parent / "idle")[1:3]
    took = line["time_s"] - before["time_s"]
    expected = sum(2.0 * c["compute_s"] + 0.5 * (took - c["compute_s"]) for c in line["choices"])
    assert line["energy_j"] == pytest.approx(expected)
    total = sum(row["energy_j"] for row in records(path.parent / "idle"))
    assert sum(device["energy_j"] for device in devices(path.parent / "idle")) == pytest.approx(total)


def test_what_a_late_device_goes_on_to_compute_counts_in_the_round_in_which_it_does(path):
    """Slow devices need 6 s; rounds are over after 4, of which 1.25 s or so are on the way."""
    changes = ("patience.deadline_s=4", "job.min_clients=1", "clients=4", "rounds=4")
    run(path, "late", *changes)
    lines = records(path.parent / "late")
    late = {c["device"] for line in lines for c in line["choices"] if c["outcome"] == "late"}
    assert late
    whole = 3.0 * STEPS * SECONDS
    for line in lines[1:]:
        for choice in line["choices"]:
            assert choice["compute_s"] <= whole + 1e-9
    by_rounds = sum(line["compute_s"] for line in lines)
    assert by_rounds == pytest.approx(sum(d["compute_s"] for d in devices(path.parent / "late")))
    slow = [d for d in devices(path.parent / "late") if d["device"] in late]
    assert all(0 < d["compute_s"] <= lines[-1]["time_s"] for d in slow)


def test_one_that_is_late_and_not_asked_again_computes_on(path):
    changes = ("patience.deadline_s=4", "job.min_clients=1", "clients=1", "rounds=8", "work.steps=30")
    changes = (*changes, "profiles.quick.slowdown=0.1", "profiles.slow.slowdown=0.6")
    run(path, "on", *changes)
    lines = records(path.parent / "on")
    asked = [sum(choice["compute_s"] for choice in line["choices"]) for line in lines]
    assert any(line["compute_s"] > mine + 1e-9 for line, mine in zip(lines, asked, strict=True))


def test_sums_for_the_head_are_computed(path):
    run(path, "head", "job.head_start=class-mean", "rounds=2", "clients=4", "profiles.quick.active_w=3.0")
    _, first, second = records(path.parent / "head")
    assert all(choice["compute_s"] > 0 for choice in first["choices"])
    assert 0 < first["compute_s"] < first["time_s"] * len(first["choices"])
    assert first["energy_j"] > 0
    assert second["compute_s"] > 0


def test_measuring_what_is_held_out_is_computed(path):
    def slow_forwards(sample):
        points = constant(sample)
        return points if sample.call.is_step else [point._replace(seconds=2.0) for point in points]

    run(path, "held", "work.held_out=0.3", measure=slow_forwards)
    run(path, "plain", measure=slow_forwards)
    held, plain = records(path.parent / "held"), records(path.parent / "plain")
    assert held[1]["compute_s"] > plain[1]["compute_s"] + 2.0
    assert held[1]["time_s"] > plain[1]["time_s"] + 2.0
