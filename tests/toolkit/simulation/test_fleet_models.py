"""Profiles, networks and availability: pure functions of seed, device and virtual time."""

from math import inf

import numpy as np
import pytest

from fleetune.device_runtime.errors import ConfigError, DataError
from fleetune.toolkit.simulation.availability import (
    Availability,
    Interruption,
    back_at,
    dropout,
    dropout_rate,
    is_there,
    leaves_at,
    pause,
)
from fleetune.toolkit.simulation.chance import chance
from fleetune.toolkit.simulation.networks import MODELS, NetworkModel, Slot, rates, read_trace, trace_rates
from fleetune.toolkit.simulation.profiles import (
    PROFILES,
    Profile,
    assign,
    energy_j,
    measure_gflops,
    slowdown,
)


def test_every_figure_has_a_source_or_is_called_an_estimate():
    for name, profile in PROFILES.items():
        assert profile.source, name
        known = {"gflops", "memory_mb", "active_w", "idle_w"} - {*profile.estimated}
        assert not known or name == "reference" or "https://" in profile.source, name
    for name, model in MODELS.items():
        known = {"down_bytes_s", "up_bytes_s"} - {*model.estimated}
        assert not known or "https://" in model.source, name
    assert {profile.network for profile in PROFILES.values()} <= MODELS.keys()


def test_a_device_is_as_slow_as_the_ratio_of_the_rates():
    assert slowdown(PROFILES["reference"], 120.0) == 1.0
    assert slowdown(PROFILES["pi-5"], 121.0) == pytest.approx(2.0)
    assert slowdown(Profile(slowdown=3.5), 0.0) == 3.5
    for here in (0.0, -1.0, float("nan"), inf):
        with pytest.raises(ConfigError, match="expected above 0"):
            slowdown(PROFILES["pi-5"], here)


def test_this_machine_has_a_rate():
    assert 0.1 < measure_gflops() < 1e4


def test_energy_is_watts_times_seconds():
    profile = Profile(slowdown=1.0, active_w=10.0, idle_w=2.0)
    assert energy_j(profile, active_s=5.0, total_s=20.0) == 10 * 5 + 2 * 15
    assert energy_j(profile, active_s=5.0, total_s=4.0) == 50


def test_profiles_get_their_parts_and_are_spread_over_sizes_of_data():
    sizes = np.random.default_rng(0).permutation(100).tolist()
    given = assign({"a": 2, "b": 1, "c": 1}, sizes, seed=1)
    assert [given.count(name) for name in "abc"] == [50, 25, 25]
    for name in "abc":
        assert np.mean(
            [size for size, one in zip(sizes, given, strict=True) if one == name]
        ) == pytest.approx(49.5, abs=3)
    assert given == assign({"c": 1, "b": 1, "a": 2}, sizes, seed=1)
    assert given != assign({"a": 2, "b": 1, "c": 1}, sizes, seed=2)


@pytest.mark.parametrize(
    ("parts", "devices", "counts"),
    [
        ({"a": 0.5, "b": 0.5}, 5, [3, 2]),
        ({"a": 1, "b": 0}, 3, [3, 0]),
        ({"a": 1, "b": 1}, 1, [1, 0]),
        ({"a": 1e-9, "b": 1}, 3, [0, 3]),
    ],
)
def test_parts_are_rounded_to_whole_devices(parts, devices, counts):
    given = assign(parts, [1] * devices, seed=0)
    assert [given.count(name) for name in "ab"] == counts


def test_bandwidth_is_the_median_times_what_its_slot_draws():
    model = NetworkModel(down_bytes_s=1000.0, up_bytes_s=100.0, sigma=0.5, slot_s=10.0)
    at = rates(model, seed=1, device=2)
    assert at(0.0) == at(9.9) == rates(model, seed=1, device=2)(5.0) != at(10.0)
    assert at(0.0) != rates(model, seed=1, device=3)(0.0)
    drawn = np.array([at(10.0 * i) for i in range(2000)])
    assert np.median(drawn[:, 0]) == pytest.approx(1000, rel=0.05)
    assert np.log(drawn[:, 0]).std() == pytest.approx(0.5, rel=0.05)
    assert drawn[:, 0] == pytest.approx(10 * drawn[:, 1])
    steady = rates(NetworkModel(down_bytes_s=7.0, up_bytes_s=3.0), seed=1, device=2)
    assert steady(0.0) == steady(1e6) == (7.0, 3.0)


def test_a_trace_is_repeated_and_devices_begin_where_they_like(tmp_path):
    (tmp_path / "t.csv").write_text("seconds,down_bytes_s,up_bytes_s\n0,100,10\n30,200,20\n50,300,30\n")
    slots = read_trace(tmp_path / "t.csv")
    assert slots[1] == Slot(seconds=30.0, down_bytes_s=200.0, up_bytes_s=20.0)
    at = trace_rates(slots, seed=1, device=0)
    assert [at(t) for t in range(70)] == [at(t + 70) for t in range(70)], (
        "the last line lasts 20 s, as the one before"
    )
    shares = [sum(at(t)[0] == rate for t in range(700)) for rate in (100.0, 200.0, 300.0)]
    assert shares == [300, 200, 200]
    assert len({trace_rates(slots, seed=1, device=i)(0.0) for i in range(20)}) == 3


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("1,1,1", "seconds must rise from 0"),
        ("0,1,1\n0,1,1", "seconds must rise from 0"),
        ("0,0,1", "line 2: .*bandwidths above 0"),
        ("0,1,nan", "expected finite numbers"),
        ("0,1,1e999", "expected finite numbers"),
        ("0,1,x", "line 2: could not convert"),
        ("", "no data line"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_line(tmp_path, lines, said):
    (tmp_path / "t.csv").write_text(f"seconds,down_bytes_s,up_bytes_s\n{lines}\n")
    with pytest.raises(DataError, match=said):
        read_trace(tmp_path / "t.csv")


def test_drop_outs_and_pauses_come_as_often_as_they_are_asked_for():
    flaky = Availability(dropout=0.2, pause=0.3, pause_s=50.0)
    rounds = range(3000)
    lost = [dropout(flaky, seed=1, device=2, round_number=r) for r in rounds]
    held = [pause(flaky, seed=1, device=2, round_number=r) for r in rounds]
    assert sum(one is not None for one in lost) / 3000 == pytest.approx(0.2, abs=0.03)
    assert sum(one is not None for one in held) / 3000 == pytest.approx(0.3, abs=0.03)
    assert np.mean([one.seconds for one in held if one]) == pytest.approx(50, rel=0.1)
    assert all(0 <= one.at < 1 and one.seconds == inf for one in lost if one)
    assert dropout(Availability(), seed=1, device=2, round_number=3) is None
    assert pause(Availability(), seed=1, device=2, round_number=3) is None
    always = dropout(Availability(dropout=1.0), seed=1, device=2, round_number=3)
    assert isinstance(always, Interruption)
    assert always == dropout(Availability(dropout=1.0), seed=1, device=2, round_number=3)


def test_a_chance_that_changes_with_the_rounds_is_that_of_each_and_its_last_stays():
    storm = Availability(dropout=(0.0, 0.6, 0.1))
    assert [dropout_rate(storm, r) for r in (1, 2, 3, 4, 99)] == [0.0, 0.6, 0.1, 0.1, 0.1]
    assert dropout_rate(Availability(dropout=0.3), 7) == 0.3
    devices = range(2000)
    lost = [
        sum(dropout(storm, seed=1, device=d, round_number=r) is not None for d in devices) for r in (1, 2, 9)
    ]
    assert lost[0] == 0
    assert lost[1] / 2000 == pytest.approx(0.6, abs=0.05)
    assert lost[2] / 2000 == pytest.approx(0.1, abs=0.03)


def test_of_equal_chances_the_same_devices_vanish_whether_it_is_one_or_a_list():
    one, many = Availability(dropout=0.4), Availability(dropout=(0.9, 0.4))
    for device in range(50):
        at = {"seed": 3, "device": device, "round_number": 2}
        assert dropout(one, **at) == dropout(many, **at)


def test_a_device_is_away_once_a_period_for_its_share():
    plan = Availability(period_s=100.0, on_share=0.75)
    there = [is_there(plan, t, seed=1, device=0) for t in range(10_000)]
    assert sum(there) / len(there) == pytest.approx(0.75, abs=0.01)
    for t in range(0, 1000, 7):
        back = back_at(plan, t, seed=1, device=0)
        assert back == t if there[t] else t < back <= t + 25
        assert is_there(plan, back, seed=1, device=0)
        if there[t]:
            leaves = leaves_at(plan, t, seed=1, device=0)
            assert t <= leaves < t + 200
            assert not is_there(plan, leaves, seed=1, device=0)
            assert all(is_there(plan, x, seed=1, device=0) for x in np.linspace(t, leaves, 5)[:-1])


def test_devices_are_away_at_times_of_their_own():
    plan = Availability(period_s=100.0, on_share=0.5)
    leave = [
        leaves_at(plan, 100.0 * n, seed=1, device=d) % 100 for d in range(20) for n in range(20) if d != n
    ]
    assert max(leave) > 45
    assert len(set(leave)) > 300


def test_without_a_period_a_device_never_leaves():
    assert is_there(Availability(), 1e9, seed=1, device=0)
    assert (
        back_at(Availability(), 5.0, seed=1, device=0),
        leaves_at(Availability(), 5.0, seed=1, device=0),
    ) == (5.0, inf)


def test_draws_of_two_purposes_and_places_are_not_shared():
    keys = [
        ("partition",),
        ("profiles",),
        ("dropout", 0, 0),
        ("dropout", 0, 1),
        ("dropout", 1, 0),
        ("pause", 0, 0),
    ]
    drawn = {float(chance(seed, *key).random()) for seed in (0, 1, 2**40) for key in keys}
    assert len(drawn) == 3 * len(keys)
