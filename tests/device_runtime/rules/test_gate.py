import json
import logging
import os
import signal
import subprocess
import sys

import children
import msgspec
import pytest
from paths import ROOT
from pretended import PretendedSystem

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.rules import gate as pause
from fleetune.device_runtime.rules.gate import Gate, be_nice, open_gate
from fleetune.device_runtime.rules.rules import Reading, Rules


class Clock:
    """A pretended monotonic clock; sleeping moves it."""

    def __init__(self):
        self.now = 1000.0
        self.naps = []
        self.at_nap = lambda: None

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds
        self.at_nap()


class World:
    """One temperature, a gate and its clock."""

    def __init__(self, degrees=50.0, **table):
        self.clock, self.changes, self.reads = Clock(), [], 0
        self.reading = Reading(temperature=degrees)
        fields = {"temperature": {"max_c": 70, "margin_c": 5}, "period_s": 5, "resume_after_s": 10, **table}
        self.gate = Gate(
            msgspec.convert(fields, Rules),
            self.read,
            on_change=self.changes.append,
            clock=self.clock,
            sleep=self.clock.sleep,
        )

    def read(self):
        self.reads += 1
        return self.reading

    def at(self, now, degrees=None):
        if degrees is not None:
            self.reading = Reading(temperature=degrees)
        return self.gate.is_open(now)

    @property
    def told(self):
        return list(map(str, self.changes))


def test_it_shuts_at_the_next_look_and_opens_below_the_margin_after_a_while():
    world = World()
    assert world.at(0)
    assert not world.at(5, 71)
    assert not world.at(10, 67), "not yet below the margin"
    assert not world.at(15, 64), "it forbade 5 s ago"
    assert world.at(20, 64)
    assert world.told == ["paused: temperature 71.0 C is above 70 C", "resumed after 15 s"]
    assert (world.gate.num_pauses, world.gate.paused_s) == (1, 15.0)
    assert world.at(25, 69), "the margin is asked for in a pause only"


def test_a_value_that_flutters_about_its_bound_pauses_once():
    world = World()
    for second in range(0, 300, 5):
        world.at(second, 71 if second % 10 else 69)
    assert world.gate.num_pauses == 1
    world.at(300, 71)
    assert not world.at(305, 60)
    assert not world.at(310, 66), "it came back before the while was over"
    assert not world.at(315, 60)
    assert world.at(320, 60)
    assert world.gate.num_pauses == 1


def test_sensors_are_read_once_a_period_and_not_at_all_without_rules():
    world = World()
    for tenth in range(100):
        assert world.at(tenth / 10)
    assert world.reads == 2
    idle = Gate(Rules(), lambda: pytest.fail("nobody asks"))
    assert idle.is_open(0)
    idle.wait()


def test_a_period_of_zero_looks_every_time():
    world = World(period_s=0)
    assert world.at(1)
    assert not world.at(1, 71)
    assert world.reads == 2


def test_a_clock_that_jumps_back_looks_anew_and_one_that_jumps_ahead_loses_nothing():
    world = World()
    assert world.at(1000)
    assert not world.at(3, 71), "the next look was due at 1005"
    assert not world.at(10**9, 71)
    assert not world.at(10**9 + 5, 60)
    assert world.at(10**9 + 10, 60)


def test_wait_returns_at_once_when_open_and_sleeps_until_it_is():
    world = World()
    world.gate.wait(lambda: pytest.fail("it is open"))
    assert world.clock.naps == []
    world.reading, shut = Reading(temperature=90.0), []
    world.clock.now += 5

    def cool():
        world.reading = Reading(temperature=60.0 if len(world.clock.naps) > 2 else 90.0)

    world.clock.at_nap = cool
    world.gate.wait(lambda: shut.append(world.clock.now))
    assert shut == [1005.0]
    assert world.clock.naps == [5.0] * 4
    assert world.told[-1] == "resumed after 20 s"


def test_it_naps_even_where_every_moment_is_due():
    world = World(degrees=90.0, period_s=0, resume_after_s=0)
    world.clock.at_nap = lambda: setattr(world, "reading", Reading(temperature=50.0))
    world.gate.wait()
    assert world.clock.naps == [0.05]


def test_other_reasons_are_news_and_other_numbers_are_not():
    world = World(battery={"min_percent": 40})
    for now, degrees, percent in ((0, 71, 90), (5, 75, 90), (10, 75, 20), (15, 50, 20), (20, 50, 90)):
        world.reading = Reading(temperature=degrees, battery=percent)
        assert not world.gate.is_open(now)
    assert [list(change.reasons) for change in world.changes] == [
        ["temperature"],
        ["battery", "temperature"],
        ["battery"],
    ]
    assert world.gate.text == "battery at 20 % is not yet at 45 %"


def test_a_missing_sensor_is_warned_of_once(caplog):
    world = World()
    with caplog.at_level(logging.WARNING):
        for second in range(0, 100, 5):
            doubts = {"temperature": "cpu says '0'"}
            world.reading = Reading(doubts=doubts) if second % 10 else Reading(temperature=50.0)
            assert world.gate.is_open(second)
        world.reading = Reading(temperature=50.0, doubts={"temperature": "gpu says '0'"})
        assert world.gate.is_open(100)
        assert world.gate.is_open(105)
    assert [record.message for record in caplog.records] == [
        "rule temperature: cpu says '0'; the rule is left out while it is so",
        "rule temperature: gpu says '0'; the others count",
    ]


def test_a_missing_sensor_denies_where_the_rule_says_so(caplog):
    world = World(temperature={"max_c": 70, "on_missing": "deny"})
    world.reading = Reading(doubts={"temperature": "no thermal zone at all"})
    assert not world.gate.is_open(0)
    assert world.told == ["paused: temperature is unknown (no thermal zone at all)"]
    assert "no training without it" in caplog.text
    assert not world.at(5, 50)
    assert world.at(10, 50)


def test_a_sensor_that_vanishes_in_a_pause_follows_its_rule():
    world = World()
    assert not world.at(0, 80)
    world.reading = Reading()
    assert not world.gate.is_open(5)
    assert world.gate.is_open(10), "allow is allow"


def test_the_time_in_a_pause_that_lasts_is_counted_up_to_the_last_look():
    world = World()
    world.at(0, 80)
    world.at(33, 80)
    assert world.gate.paused_s == 33.0


def test_open_gate_reads_the_system_that_the_rules_name(tmp_path):
    system = PretendedSystem(tmp_path / "host")
    system.zone(80)
    table = {"root": str(system.root), "temperature": {"max_c": 70}, "period_s": 0, "resume_after_s": 0}
    gate = open_gate(table)
    assert not gate.is_open(0)
    system.zone(60)
    assert gate.is_open(1)
    (tmp_path / "rules.toml").write_text(
        f"[rules]\nroot = '{system.root}'\nnetwork = {{ allowed = ['none'] }}"
    )
    system.uplink("eth0")
    system.interface("eth0", "device")
    assert not open_gate(tmp_path / "rules.toml").is_open(0)
    assert open_gate(None).is_open(0)


def run(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_thread_becomes_nice_and_those_to_come():
    """By levels above the one that the tests run at: nobody may raise a priority."""
    low, lower = (min(os.getpriority(os.PRIO_PROCESS, 0) + more, 19) for more in (3, 7))
    code = f"""
import os, threading
from fleetune.device_runtime.rules.gate import be_nice
go, ask = threading.Event(), lambda: print(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
early = threading.Thread(target=lambda: (go.wait(), ask()))
early.start()
be_nice({lower})
be_nice({low})
go.set(); early.join(); ask()
late = threading.Thread(target=ask); late.start(); late.join()
"""
    assert run(code).split() == [str(lower)] * 3


def test_a_system_that_refuses_is_named(monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(pause.os, "setpriority", refuse)
    with pytest.raises(
        ConfigError, match=r"rules\.nice = 19: the system does not let .*: Operation not permitted"
    ):
        be_nice(19)


@pytest.fixture
def paused_run(word_artifact, word_file, tmp_path):
    """``fleetune train`` in a process of its own on a pretended system that is hot; gives it when it pauses."""
    system = PretendedSystem(tmp_path / "host")
    system.zone(90)
    (tmp_path / "rules.toml").write_text(
        f"root = '{system.root}'\nperiod_s = 0\nresume_after_s = 0\ntemperature = {{ max_c = 70 }}\n"
    )
    words = ["train", str(word_artifact), "--data", str(word_file), "--out", str(tmp_path / "run"), "--json"]
    words += ["--rules", str(tmp_path / "rules.toml"), "--steps", "6", "--seq-len", "16", "--threads", "1"]
    command = [sys.executable, "-c", "from fleetune.toolkit.cli import main; main()", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with children.start(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            first = process.stderr.readline()
            assert first == "paused: temperature 90.0 C is above 70 C\n", first + process.stderr.read()
            yield process, system
        finally:
            process.kill()


def test_sigterm_in_a_pause_ends_at_once_and_cleanly(paused_run, tmp_path):
    process, _ = paused_run
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "")
    assert err.splitlines()[-1] == "stopped at step 0 of 6"
    assert list((tmp_path / "run").iterdir()) == []


def test_the_command_resumes_by_itself_and_says_so(paused_run):
    process, system = paused_run
    system.zone(50)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err.startswith("resumed after 0 s\n")
    report = json.loads(out)
    assert (report["steps"], report["pauses"]) == (6, 1)
    assert report["paused_s"] > 0
