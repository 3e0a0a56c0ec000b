"""The files that `fleetune init` writes are read by the commands that they are for, as they are and with every option on."""

import inspect
import re

import pytest
from typer.testing import CliRunner

from fleetune.broker.aggregation import aggregate
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.rules.rules_file import load_rules
from fleetune.toolkit.cli import app
from fleetune.toolkit.commands.options import AGGREGATE, DEVICE
from fleetune.toolkit.configuration import resolve
from fleetune.toolkit.flags import claimed
from fleetune.toolkit.initial import ROLES, init

READERS = {"aggregate": (aggregate, AGGREGATE), "device": (device, DEVICE)}
OPTION = re.compile(r"^# ([a-z_0-9]+ = .*)$", re.MULTILINE)
each_role = pytest.mark.parametrize("role", ROLES, ids=lambda role: role.file)


def read(path, role):
    """As the command reads it, with no flag given but the artifact."""
    function, parts = READERS[role.table]
    own = [name for name in inspect.signature(function).parameters if name not in parts]
    flags = {**dict.fromkeys([*own, *claimed(parts)]), "artifact_dir": "artifact"}
    return resolve(function, flags, config=path, table=role.table, parts=parts)


@each_role
def test_its_command_reads_it_and_has_what_a_flag_less_call_has(role, tmp_path):
    init(tmp_path, job="farm", mqtt="mqtts://broker:8883")
    found = read(tmp_path / role.file, role)
    assert found["mqtt"] == "mqtts://broker:8883"
    assert (found["job"].job if role.table == "aggregate" else found["job"]) == "farm"
    structs = [value for name, value in found.items() if name in READERS[role.table][1]]
    assert [problem for struct in structs for problem in problems(struct)] == []
    if role.file == "evaluator.toml":
        assert found["duty"].role == "evaluate"


@each_role
def test_every_option_is_in_it_with_its_default(role, tmp_path):
    init(tmp_path)
    path = tmp_path / role.file
    as_it_is = read(path, role)
    text = path.read_text()
    told = {line.partition(" = ")[0] for line in OPTION.findall(text.partition("[rules]")[0])}
    said = set(re.findall(r"^([a-z_0-9]+) = ", text, re.MULTILINE))
    assert told | said >= claimed(READERS[role.table][1]).keys()
    before, mark, after = text.partition("# When the device may work")
    path.write_text(OPTION.sub(r"\1", before) + mark + after)
    assert read(path, role) == as_it_is, "a default that is written down changes nothing"


def test_the_rules_that_are_shown_are_rules(tmp_path):
    init(tmp_path)
    shown = (tmp_path / "device.toml").read_text().partition("# [rules]\n")[2]
    (tmp_path / "rules.toml").write_text("\n".join(line.removeprefix("# ") for line in shown.splitlines()))
    assert load_rules(tmp_path / "rules.toml").asked.keys() == {"power", "temperature", "hours"}


def test_nothing_is_written_over_and_no_login_is_written_down(tmp_path):
    (tmp_path / "device.toml").write_text("mine")
    with pytest.raises(ConfigError, match=r"device\.toml: there already; --force writes over it"):
        init(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["device.toml"]
    with pytest.raises(ConfigError, match="FLEETUNE_MQTT_PASSWORD") as caught:
        init(tmp_path, mqtt="mqtts://kitchen:secret@server", force=True)
    assert "secret" not in str(caught.value)
    init(tmp_path, force=True)
    assert (tmp_path / "device.toml").read_text().startswith("# A device")


def test_the_command_says_what_to_do_with_them(tmp_path):
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new"), "--job", "farm"])
    assert done.exit_code == 0
    assert (
        done.stdout.splitlines()[1]
        == f"{tmp_path / 'new/device.toml'}: fleetune device ARTIFACT --config device.toml"
    )
