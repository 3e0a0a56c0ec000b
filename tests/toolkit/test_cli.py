import inspect
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import children
import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.cli import COMMANDS, app
from fleetune.toolkit.commands import running

HOMES = {
    "export": "fleetune.toolkit.export",
    "inspect": "fleetune.device_runtime.commands.inspect",
    "selfcheck": "fleetune.device_runtime.commands.selfcheck",
    "train": "fleetune.device_runtime.commands.train",
    "predict": "fleetune.device_runtime.commands.predict",
    "device": "fleetune.device_runtime.commands.device",
    "aggregate": "fleetune.broker.aggregation",
    "broker": "fleetune.broker.servers.embedded",
    "merge": "fleetune.toolkit.merge",
    "demo": "fleetune.toolkit.demo",
    "bench": "fleetune.toolkit.benchmark",
}
AROUND = {"config", "json", "verbose"}


def fleetune(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def function_of(name):
    return getattr(import_module(HOMES[name]), "serve" if name == "broker" else name)


@pytest.fixture
def stand_in(monkeypatch):
    """Replace what a command calls by a function; returns what it was called with."""

    def replace(function):
        monkeypatch.setattr(running, "import_module", lambda name: SimpleNamespace(train=function))

    return replace


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_every_option_is_a_parameter_of_the_function(command):
    options = list(inspect.signature(command).parameters)
    parameters = list(inspect.signature(function_of(command.__name__)).parameters)
    positional = 0 if command.__name__ in ("broker", "demo") else 1
    assert set(options[positional:]) - AROUND <= set(parameters[positional:])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.__name__)
def test_the_defaults_that_help_shows_are_the_functions_own(command):
    parameters = inspect.signature(function_of(command.__name__)).parameters
    for name, option in inspect.signature(command, eval_str=True).parameters.items():
        text = getattr(option.annotation.__metadata__[0], "help", "") or ""
        shown = text.partition("[default: ")[2].rstrip("]")
        default = parameters[name].default if name in parameters else None
        if shown and default not in (None, inspect.Parameter.empty) and " " not in shown:
            assert shown == str(default), name


def test_help_and_version():
    assert fleetune("--help").exit_code == 0
    version = fleetune("--version")
    assert (version.exit_code, version.stdout.split()[0]) == (0, "fleetune")


def test_usage_mistakes_end_with_2(tmp_path):
    assert fleetune("nonsense").exit_code == 2
    assert fleetune("train").exit_code == 2
    assert fleetune("train", tmp_path, "--speed", "1").exit_code == 2
    missing = fleetune("train", tmp_path)
    assert missing.exit_code == 2
    assert missing.stderr == "fleetune: train needs --data and --out\n"


def test_our_errors_are_one_line_and_1(tmp_path):
    failed = fleetune("inspect", tmp_path)
    assert failed.exit_code == 1
    assert failed.stdout == ""
    assert failed.stderr.startswith(f"fleetune: {tmp_path}: no artifact here")
    assert failed.stderr.count("\n") == 1


def test_an_unknown_key_in_a_file_is_one_line(tmp_path):
    (tmp_path / "c.toml").write_text("[train]\nlearning_rate = 1\n")
    failed = fleetune("train", tmp_path, "--config", tmp_path / "c.toml")
    assert failed.exit_code == 1
    assert "unknown key 'learning_rate'; have: " in failed.stderr


def test_json_is_one_object_on_the_last_line_and_progress_is_elsewhere(stand_in):
    def train(
        artifact_dir, *, data: str, out: str, steps: int = 1, on_step: Any = None, on_note: Any = None
    ) -> dict[str, Any]:
        on_step(SimpleNamespace(step=0, total_steps=1, loss=2.5, seconds=0.1))
        return {"steps": steps, "loss": float("nan")}

    stand_in(train)
    done = fleetune("train", "x", "--data", "d", "--out", "o", "--steps", 3, "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {"steps": 3, "loss": None}
    assert "step 1: loss 2.5000, 100 ms" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("one\nline"), 1, "fleetune: one line\n"),
        (
            ModuleNotFoundError("", name="torch.nn"),
            1,
            "fleetune: train needs torch; run: pip install 'fleetune[export]'",
        ),
        (ModuleNotFoundError("", name="onnxruntime"), 1, "pip install 'fleetune[device]'"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "fleetune: /x/y: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_goes_wrong_is_one_line(stand_in, error, code, words):
    def train(artifact_dir, *, data: str, out: str, on_step: Any = None, on_note: Any = None) -> None:
        raise error

    stand_in(train)
    failed = fleetune("train", "x", "--data", "d", "--out", "o")
    assert failed.exit_code == code
    assert words in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_a_module_of_ours_that_is_missing_is_not_hidden(stand_in):
    def train(artifact_dir, *, data: str, out: str, on_step: Any = None, on_note: Any = None) -> None:
        raise ModuleNotFoundError("No module named 'fleetune.toolkit.gone'", name="fleetune.toolkit.gone")

    stand_in(train)
    assert isinstance(fleetune("train", "x", "--data", "d", "--out", "o").exception, ModuleNotFoundError)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_cleanly(number, code):
    """The embedded server runs until it is told to stop; `finally` blocks run either way."""
    with children.start(
        [sys.executable, "-c", _WAITING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ,
        text=True,
    ) as process:
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "cleaned up\n"
    assert "Traceback" not in err


_WAITING = """
import sys, threading, types
from fleetune.toolkit.commands import running
def train(artifact_dir, *, data: str, out: str, on_step=None, on_note=None):
    try:
        print("waiting", flush=True)
        threading.Event().wait(60)
    finally:
        print("cleaned up", flush=True)
running.import_module = lambda name: types.SimpleNamespace(train=train)
from fleetune.toolkit.cli import main
sys.argv = ["fleetune", "train", "x", "--data", "d", "--out", "o"]
main()
"""
