"""A whole simulation on the tiny artifact: same bits whoever works and whatever is killed, and times as computed by hand."""

import signal
import subprocess
import sys
from itertools import pairwise

import pytest
from paths import ROOT
from simulated import SECONDS, constant, devices, outcome, records, run, write_config

from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.files import alone_in
from fleetune.toolkit.simulation.costs import Point
from fleetune.toolkit.simulation.simulate import simulate

STEPS, LATENCY_S = 4, 0.25
SUFFIX = ("work.policy.name=suffix", "work.policy.drop=0.5")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("simulation"))


@pytest.fixture(scope="module")
def undisturbed(path):
    run(path, "undisturbed")
    return outcome(path.parent / "undisturbed")


def test_any_number_of_workers_gives_the_same_bits(path, undisturbed):
    for count in (2, 3):
        run(path, f"workers-{count}", workers=count)
        assert outcome(path.parent / f"workers-{count}") == undisturbed


def test_the_seed_decides(path, undisturbed):
    run(path, "again")
    assert outcome(path.parent / "again") == undisturbed
    run(path, "other-seed", "seed=1")
    assert outcome(path.parent / "other-seed")[0] != undisturbed[0]


def test_virtual_time_is_what_it_is_by_hand(path, undisturbed):
    rounds = undisturbed[0]
    assert [line["round"] for line in rounds] == [0, 1, 2, 3]
    assert rounds[0]["time_s"] == 0
    for before, line in pairwise(rounds):
        slowest = max(3.0 if choice["profile"] == "slow" else 1.0 for choice in line["choices"])
        # Hello and offer, or offer, request and chunk; then announcement, request and chunk of the update.
        messages = 5 if line["round"] == 1 else 6
        expected = messages * LATENCY_S + slowest * STEPS * SECONDS
        assert line["time_s"] - before["time_s"] == pytest.approx(expected, abs=1e-6)


def test_compute_and_energy_are_those_of_the_profiles(undisturbed):
    line = undisturbed[0][-1]
    by_device = {
        c["device"]: (3.0 if c["profile"] == "slow" else 1.0) * STEPS * SECONDS for c in line["choices"]
    }
    assert {c["device"]: c["compute_s"] for c in line["choices"]} == pytest.approx(by_device)
    assert line["compute_s"] == pytest.approx(sum(by_device.values()))
    assert line["energy_j"] == pytest.approx(2.0 * line["compute_s"])
    assert 50 < line["peak_mb_mean"] <= line["peak_mb"] < 200


def test_every_version_is_measured_and_the_model_learns(undisturbed):
    accuracies = [line["accuracy"] for line in undisturbed[0]]
    assert None not in accuracies
    assert accuracies[-1] > accuracies[0]


def test_bandwidth_delays_a_round_by_its_bytes(path, undisturbed):
    run(path, "narrow", "networks.far.up_bytes_s=1000")
    narrow, wide = records(path.parent / "narrow"), undisturbed[0]
    assert [line["accuracy"] for line in narrow] == [line["accuracy"] for line in wide]
    chunk_bytes = narrow[1]["bytes_up"] / narrow[1]["devices"]
    late_s = narrow[1]["time_s"] - wide[1]["time_s"]
    # The chunk itself, and the few hundred bytes of status, hello, announcement and envelopes.
    assert chunk_bytes / 1000 < late_s < chunk_bytes / 1000 + 1.5


def test_killed_in_the_middle_it_is_replayed_to_the_same_records(path):
    """With real timings, which are in the folder: they are not measured again."""
    out = path.parent / "killed"
    command = [
        sys.executable,
        "-m",
        "fleetune",
        "simulate",
        str(path),
        "--out",
        str(out),
        "--workers",
        "2",
        "--set",
        "rounds=8",
        "--no-charts",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        for line in process.stderr:
            if line.startswith("round 3"):
                break
        process.send_signal(signal.SIGKILL)
    assert not (out / "run.json").exists()
    timings = (out / "timings.json").read_bytes()
    run(path, "killed", "rounds=8", measure=None, resume=True)
    assert (out / "timings.json").read_bytes() == timings
    whole = path.parent / "whole"
    whole.mkdir()
    (whole / "timings.json").write_bytes(timings)
    run(path, "whole", "rounds=8", measure=None)
    assert outcome(out) == outcome(whole)


def test_a_replay_trains_nothing_again(path, undisturbed, monkeypatch):
    run(path, "more")
    monkeypatch.setattr("fleetune.toolkit.simulation.bench.Bench.do", lambda *_: pytest.fail("it was done"))
    (path.parent / "more" / "run.json").unlink()
    run(path, "more")
    assert outcome(path.parent / "more") == undisturbed


def test_a_finished_one_says_so_and_more_rounds_go_on(path, undisturbed):
    notes = []
    first = run(path, "finished")
    assert run(path, "finished", on_note=notes.append) == first
    assert "3 rounds were done before" in notes[0]
    assert run(path, "finished", "rounds=4").rounds == 4
    assert records(path.parent / "finished")[:4] == undisturbed[0]


def test_after_a_time_no_round_begins_and_a_longer_one_goes_on(path, undisturbed):
    out, lines = path.parent / "until", undisturbed[0]
    until = (lines[1]["time_s"] + lines[2]["time_s"]) / 2
    assert run(path, "until", f"until_s={until}").rounds == 2
    assert records(out) == lines[:3]
    notes = []
    run(path, "until", f"until_s={until}", on_note=notes.append)
    assert "2 rounds were done before" in notes[0]
    assert run(path, "until", f"until_s={lines[2]['time_s'] + 0.001}").rounds == 3
    assert outcome(out) == undisturbed


def test_what_a_device_does_beside_its_steps_delays_a_round(path, undisturbed, monkeypatch):
    module = "fleetune.toolkit.simulation.simulate"
    monkeypatch.setattr(f"{module}.time_rounds", lambda *_, **__: [Point(1, 11.0), Point(9, 19.0)])
    monkeypatch.setattr(f"{module}.Stopwatch.__call__", lambda _, sample: constant(sample))
    run(path, "beside", "rounds=1", measure=None)
    slowest = max(3.0 if c["profile"] == "slow" else 1.0 for c in undisturbed[0][1]["choices"])
    late_s = records(path.parent / "beside")[1]["time_s"] - undisturbed[0][1]["time_s"]
    assert late_s == pytest.approx(slowest * (10 + STEPS))


def test_another_simulation_in_the_folder_is_refused(path):
    run(path, "taken", "rounds=1")
    with pytest.raises(ConfigError, match="another simulation"):
        run(path, "taken", "rounds=1", "work.steps=5")
    with pytest.raises(ConfigError, match="no simulation lies there"):
        run(path, "nothing", resume=True)
    (path.parent / "foreign").mkdir()
    (path.parent / "foreign" / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"run\.json of another command"):
        run(path, "foreign")


def test_two_in_one_folder_are_refused_before_anything_is_cleared(path):
    run(path, "shared", "rounds=1")
    out = path.parent / "shared"
    before = {file: file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}
    with (
        alone_in(out, "", lock="simulation.lock"),
        pytest.raises(StateError, match="another simulation works"),
    ):
        run(path, "shared", "rounds=2")
    assert before == {file: file.read_bytes() for file in before}


def test_a_device_that_vanishes_is_told_and_the_round_goes_on_without_it(path):
    changes = ("rounds=6", "availability.dropout=0.4", "patience.deadline_s=60", "job.min_clients=1")
    run(path, "vanishing", *changes)
    lines = records(path.parent / "vanishing")
    lost = [(line, c) for line in lines for c in line["choices"] if c["outcome"] == "dropped-out"]
    assert lost
    assert any(line["devices"] < 3 for line, _ in lost)
    spans = [after["time_s"] - before["time_s"] for before, after in pairwise(lines)]
    assert max(spans) < 3 * STEPS * SECONDS + 20, "nobody who is gone is waited for to the deadline"
    for _, choice in lost:
        whole = (3.0 if choice["profile"] == "slow" else 1.0) * STEPS * SECONDS
        assert 0 <= choice["compute_s"] < whole
    assert {c["outcome"] for line in lines[-1:] for c in line["choices"]} <= {"counted", "dropped-out"}
    run(path, "vanishing-again", *changes, workers=2)
    assert outcome(path.parent / "vanishing-again") == outcome(path.parent / "vanishing")


@pytest.mark.parametrize("strategy", ["safari", "own-last"])
def test_something_stands_in_for_devices_that_vanish_in_later_rounds(path, strategy):
    changes = ("rounds=4", "availability.dropout=[0, 0, 0.7]", "patience.deadline_s=60", "job.min_clients=1")
    for name in (strategy, "fedavg"):
        run(path, name, *changes, f"job.strategy={name}")
    mine, dropping = (records(path.parent / name) for name in (strategy, "fedavg"))
    lost = [[c["outcome"] for c in line["choices"]].count("dropped-out") for line in mine]
    assert lost[:3] == [0, 0, 0]
    assert sum(lost[3:])
    same = [line["loss"] == other["loss"] for line, other in zip(mine, dropping, strict=True)]
    assert same[:3] == [True, True, True]
    assert not all(same)


def test_a_pause_makes_a_device_late_by_its_length(path, undisturbed):
    run(path, "pausing", "availability.pause=1", "availability.pause_s=1000", "rounds=1")
    assert records(path.parent / "pausing")[1]["time_s"] > undisturbed[0][1]["time_s"] + 10


def test_devices_that_come_and_go_take_part_when_they_are_there(path):
    changes = (
        "availability.period_s=12",
        "availability.on_share=0.5",
        "patience.deadline_s=20",
        "job.min_clients=1",
    )
    report = run(path, "comers", *changes)
    assert report.rounds == 3
    lines = records(path.parent / "comers")
    assert lines[-1]["time_s"] > 0


def test_a_frozen_prefix_is_found_in_the_cache_from_the_second_epoch_on(path):
    asked = []

    def watch(sample):
        asked.append(sample.cached)
        return [(1, 0.1 if sample.cached else 0.5), (2, 0.1 if sample.cached else 0.5)]

    def points(sample):
        return [type(constant(sample)[0])(*point) for point in watch(sample)]

    run(path, "cached", *SUFFIX, measure=points)
    lines = records(path.parent / "cached")
    assert asked.count(True) == 1
    run(path, "uncached", *SUFFIX, "cache.hidden_cache=false", measure=points)
    plain = records(path.parent / "uncached")
    assert lines[-1]["compute_s"] < plain[-1]["compute_s"]


def test_devices_that_cannot_make_a_round_end_it_in_one_line(path):
    with pytest.raises(ConfigError, match="4 of 4 devices have samples; a round needs at least 9"):
        run(path, "too-few", "clients=9")
    away = ("availability.period_s=1e9", "availability.on_share=1e-9", "patience.deadline_s=0")
    with pytest.raises(ConfigError, match=r"round \d: nothing has come of it"):
        run(path, "away", *away)


def test_numbers_of_devices_add_up(path, undisturbed):
    rounds, found, _ = undisturbed
    assert len(found) == 4
    assert sum(d["rounds"] for d in found) == sum(line["devices"] for line in rounds)
    assert sum(d["compute_s"] for d in found) == pytest.approx(sum(line["compute_s"] for line in rounds))
    assert sum(d["bytes_up"] for d in found) > sum(line["bytes_up"] for line in rounds)
    assert devices(path.parent / "undisturbed") == found


def test_where_matplotlib_is_the_run_is_drawn(path):
    pytest.importorskip("matplotlib")
    run(path, "drawn", "rounds=1", charts=True)
    assert {"accuracy.svg", "arms.svg", "memory.svg"} <= {
        file.name for file in (path.parent / "drawn").iterdir()
    }


def test_without_ray_its_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"fleetune\[ray\]"):
        simulate(path, out=path.parent / "no-ray", ray="local")


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_bits(path, undisturbed):
    pytest.importorskip("ray")
    run(path, "ray", ray="local", workers=2)
    assert outcome(path.parent / "ray") == undisturbed
