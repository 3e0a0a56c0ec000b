"""`fleetune enrol` and `fleetune authority`: a device's way into a fleet, typed; and what goes wrong, on one line."""

import inspect
import json

import pytest
from typer.testing import CliRunner

from fleetune.broker.authority import authority
from fleetune.toolkit.cli import app
from fleetune.toolkit.commands import running, trust


def fleetune(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_devices_way_into_a_fleet_and_out_of_it(tmp_path):
    house, own = tmp_path / "trust", tmp_path / "own"
    made = fleetune("authority", "init", house, "--host", "server", "--host", "10.0.0.2")
    assert (made.exit_code, made.stderr) == (0, "")
    assert "for the aggregator: " in made.stdout
    enrolled = fleetune("enrol", "kitchen", "--out", own)
    assert f"{own}/kitchen.key: the key, made; it stays on this machine" in enrolled.stdout
    assert "here already, not changed" in fleetune("enrol", "kitchen", "--out", own).stdout
    signed = json.loads(fleetune("authority", "sign", house, own / "kitchen.csr", "--json").stdout)
    assert (signed["name"], signed["is_new"]) == ("kitchen", True)
    again = fleetune("authority", "sign", house, own / "kitchen.csr", "--out", own)
    assert "(made before)" in again.stdout
    assert "kitchen.crt: the certificate\n" in fleetune("enrol", "kitchen", "--out", own).stdout
    fleetune("authority", "server", house, "--host", "elsewhere", "--days", 9)
    fleetune("authority", "aggregator", house)
    assert f"kitchen: revoked {signed['serial']}" in fleetune("authority", "revoke", house, "kitchen").stdout
    listed = fleetune("authority", "list", house).stdout.splitlines()
    assert [(line.split()[0], line.split()[-1]) for line in listed] == [
        ("aggregator", "replaced"), ("server", "valid"), ("kitchen", "revoked"), ("elsewhere", "valid"),
        ("aggregator", "valid"),
    ]  # fmt: skip
    rows = json.loads(fleetune("authority", "list", house, "--json").stdout)["results"]
    assert [row["kind"] for row in rows] == ["aggregator", "server", "device", "server", "aggregator"]


def test_one_command_configures_a_server(tmp_path):
    fleetune("authority", "init", tmp_path / "trust", "--host", "server")
    words = ["--configure", tmp_path / "m", "--authority", tmp_path / "trust", "--jobs", "home,work"]
    words += ["--max-connections", 500, "--log-file", tmp_path / "log", "--log-packets"]
    done = fleetune("broker", *words)
    assert done.exit_code == 0, done.stderr
    lines = (tmp_path / "m" / "mosquitto.conf").read_text().splitlines()
    assert [line for line in lines if line.startswith("listener")] == ["listener 8883", "listener 8884"]
    for line, number in (
        ("max_connections 500", 1), ("use_username_as_clientid true", 1), (f"log_dest file {tmp_path / 'log'}", 1),
        ("log_type all", 1), (f"crlfile {tmp_path / 'm' / 'tls' / 'revoked.pem'}", 2), ("require_certificate true", 2),
    ):  # fmt: skip
        assert lines.count(line) == number, line
    access = (tmp_path / "m" / "fleetune.acl").read_text()
    assert "pattern write fleetune/v1/home/device/%u/up\n" in access
    assert "pattern read fleetune/v1/work/aggregator/status\n" in access
    wide = [line for line in access.splitlines() if line.startswith("pattern") and set(line) & set("+#")]
    assert all(
        line.startswith("pattern read fleetune/v1/") and line.endswith("/shared/+/+") for line in wide
    ), wide


@pytest.mark.parametrize("command", trust.authority.registered_commands, ids=lambda c: c.callback.__name__)
def test_every_option_of_authority_is_a_parameter_of_its_function_with_its_default(command):
    name = command.callback.__name__
    parameters = inspect.signature(getattr(authority, {"listing": "listed"}.get(name, name))).parameters
    for option, given in inspect.signature(command.callback, eval_str=True).parameters.items():
        if option in ("json", "verbose"):
            continue
        parameter = parameters[{"host": "hosts"}.get(option, option)]
        text = getattr(given.annotation.__metadata__[0], "help", "") or ""
        shown = text.partition("[default: ")[2].rstrip("]")
        if shown and parameter.default is not None:
            assert shown == str(parameter.default), option


def test_what_goes_wrong_is_one_line(tmp_path, monkeypatch):
    for words, code, said in (
        (("authority", "list", tmp_path), 1, "no authority here"),
        (("authority", "sign", tmp_path), 2, "authority sign: missing argument 'REQUEST'; see fleetune authority sign --help"),
        (("authority", "nonsense"), 2, "authority: no such command 'nonsense'; see fleetune authority --help"),
        (("enrol", "a/b", "--out", tmp_path / "o"), 1, "device 'a/b': use 1 to 64 letters"),
        (("enrol", "kitchen"), 2, "enrol: needs --out"),
    ):  # fmt: skip
        failed = fleetune(*words)
        assert (failed.exit_code, failed.stderr.count("\n")) == (code, 1), failed.stderr
        assert said in failed.stderr

    def gone(name):
        raise ModuleNotFoundError(name="cryptography.x509")

    monkeypatch.setattr(running, "import_module", gone)
    failed = fleetune("authority", "list", tmp_path)
    assert failed.stderr == "fleetune: authority needs cryptography; run: pip install 'fleetune[trust]'\n"
