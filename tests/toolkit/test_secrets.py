"""No way to give a login wrongly has it repeated on the terminal."""

import json

import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.network.address import has_password, without_logins
from fleetune.toolkit.cli import app

ADDRESS = "mqtts://ann:s3cret/Pa55@host"


@pytest.fixture
def said(tmp_path):
    """What the command line says to these words, or to ``[device]`` and these lines of a file."""

    def ask(*words, lines=""):
        path = tmp_path / "device.toml"
        path.write_text(f"[device]\n{lines}\n")
        config = ["--config", str(path)] if lines else []
        outcome = CliRunner().invoke(app, [*map(str, words), *config])
        assert outcome.exit_code in (1, 2)
        return outcome.output

    return ask


def test_a_word_too_many_or_an_unknown_command(said, word_artifact):
    for words in ((ADDRESS,), ("device", word_artifact, ADDRESS), ("aggregate", word_artifact, "x", ADDRESS)):
        assert "s3cret" not in said(*words)
        assert "Pa55" not in said(*words)


def test_a_file_with_an_address_of_a_wrong_type_or_a_wrong_form(said, word_artifact):
    for lines in (
        f"mqtt = [{json.dumps(ADDRESS)}]",
        f"mqtt = {json.dumps(ADDRESS)}\njob = 'home'\ndata = 'x.csv'",
    ):
        text = said("device", word_artifact, lines=lines)
        assert "mqtt" in text.lower()
        assert "s3cret" not in text
        assert "Pa55" not in text


def test_only_logins_are_hidden():
    text = "mqtt://ann:a/b@c@host and mqtts://host:1 and a@b"
    assert without_logins(text) == "mqtt://…@host and mqtts://host:1 and a@b"


READ_BY_ALL = "every user of this machine can read a command line"
UNREACHED = "mqtt://ann:s3cret@127.0.0.1:9"


@pytest.mark.parametrize("command", ["device", "aggregate"])
def test_a_password_on_the_command_line_is_warned_of(said, word_artifact, word_file, tmp_path, command):
    words = {
        "device": ["--data", word_file, "--state", tmp_path / "s"],
        "aggregate": ["--out", tmp_path / "o", "--rounds", "1", "--clients", "1"],
    }
    text = said(
        command, word_artifact, "--job", "home", "--mqtt", UNREACHED, "--timeout-s", "0.1", *words[command]
    )
    assert READ_BY_ALL in text
    assert "FLEETUNE_MQTT_PASSWORD" in text
    assert "s3cret" not in text


def test_one_in_a_file_or_in_the_environment_is_not(said, word_artifact, word_file, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEETUNE_MQTT_PASSWORD", "s3cret")
    lines = f"mqtt = '{UNREACHED}'\njob = 'home'\ndata = '{word_file}'\nstate = '{tmp_path}'\ntimeout_s = 0.1"
    assert READ_BY_ALL not in said("device", word_artifact, lines=lines)
    words = ("--job", "home", "--data", word_file, "--state", tmp_path / "s", "--timeout-s", "0.1")
    assert READ_BY_ALL not in said("device", word_artifact, "--mqtt", "mqtt://ann@127.0.0.1:9", *words)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        (ADDRESS, True),
        ("mqtt://ann:p@host", True),
        ("mqtt://ann:a@b:c/d@host:1", True),
        ("mqtt://ann@host:1883", False),
        ("mqtt://[::1]:1883", False),
        ("mqtts://host:1/path", False),
    ],
)
def test_a_password_in_an_address_is_known(text, holds):
    assert has_password(text) == holds
