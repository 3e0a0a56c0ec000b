"""No way to give a login wrongly has it repeated on the terminal."""

import json

import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.network.address import without_logins
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
