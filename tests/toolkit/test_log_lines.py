"""The log as JSON: every line is one object, whatever is in it, and says what it is about."""

import json
import logging
import subprocess
import sys

import children
import pytest
from processes import environment
from waiting import until

from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.agent.events import Event
from fleetune.toolkit.log_lines import JsonLines, context_of, events


def line_of(message, *args, level=logging.INFO, fields=None, context=None):
    lines = JsonLines()
    lines.context = context or {}
    record = logging.LogRecord("fleetune.broker.rounds", level, __file__, 1, message, args, None)
    if fields:
        record.fields = fields
    text = lines.format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_says_when_how_bad_who_and_what():
    line = line_of("a\nb \x1b[31m %s", "c", level=logging.WARNING, context={"job": "home"})
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "fleetune.broker.rounds",
        "message": "a\nb \x1b[31m c",
        "job": "home",
    }


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("round 3: closed with kitchen", {"round": 3}),
        ("device kitchen is gone", {"device": "kitchen"}),
        ("round 4: device hall: refused", {"round": 4, "device": "hall"}),
        ("report of device hall refused: round 9", {"device": "hall"}),
        ("finished: round 3: device x", {}),
    ],
)
def test_round_and_device_are_known_from_how_our_lines_begin(message, expected):
    line = line_of(message, context={"job": "home"})
    assert {name: line[name] for name in ("round", "device") if name in line} == expected


def test_what_a_command_is_about_is_in_every_line():
    assert context_of({"job": "home", "id": "kitchen"}) == {"job": "home", "device": "kitchen"}
    assert context_of({"job": Job("home", rounds=1, clients=1)}) == {"job": "home"}


def test_events_have_their_figures(caplog):
    with events("fleetune.device")(None) as tell, caplog.at_level(logging.INFO):
        tell(Event("step", 2, {"step": 7, "loss": 0.5}))
        tell("round 2: waiting")
    assert [record.fields for record in caplog.records] == [
        {"round": 2, "event": "step", "values": {"step": 7, "loss": 0.5}},
        {},
    ]


def test_a_job_and_its_device_log_json_and_nothing_else(word_artifact, word_file, mosquitto, tmp_path):
    shared = ["--mqtt", mosquitto.url, "--job", "home", "--log-json"]
    commands = {
        "aggregate": ["--rounds", "1", "--clients", "1", "--local-steps", "2", "--out", tmp_path / "run"],
        "device": [
            "--data",
            word_file,
            "--id",
            "kitchen",
            "--state",
            tmp_path / "state",
            "--least-effective",
            "0",
        ],
    }
    running = {}
    for name, words in commands.items():
        command = [sys.executable, "-m", "fleetune", name, word_artifact, *words, *shared]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running[name] = children.start(command, env=environment(), **pipes)
    said = {name: process.communicate(timeout=60)[1] for name, process in running.items()}
    until(lambda: all(process.poll() is not None for process in running.values()))
    for name, text in said.items():
        lines = [json.loads(line) for line in text.splitlines()]
        assert {"time", "level", "logger", "message", "job"} <= set.intersection(
            *(set(line) for line in lines)
        ), name
    device = [json.loads(line) for line in said["device"].splitlines()]
    assert {line["device"] for line in device} == {"kitchen"}
    assert {"offer", "accepted", "finished"} <= {line.get("event") for line in device}
    rounds = [json.loads(line) for line in said["aggregate"].splitlines()]
    assert [line["round"] for line in rounds if line.get("event") == "round"] == [0, 1]


def test_an_error_is_a_line_too(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fleetune",
        "device",
        str(tmp_path),
        "--log-json",
        "--mqtt",
        "mqtt://u:secret@h",
    ]
    done = subprocess.run(
        [*command, "--job", "home", "--data", "x"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    noted, line = [json.loads(line) for line in done.stderr.splitlines()]
    assert (noted["level"], "FLEETUNE_MQTT_PASSWORD" in noted["message"]) == ("warning", True)
    assert (done.returncode, line["level"], line["job"]) == (1, "error", "home")
    assert "secret" not in done.stderr
