"""The systemd unit and the configuration beside it, as the documentation hands them out."""

import configparser
import inspect
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.rules.rules_file import load_rules
from fleetune.toolkit.commands.federation import device as command
from fleetune.toolkit.commands.options import DEVICE
from fleetune.toolkit.configuration import resolve

DOCS = ROOT / "docs"
UNIT = DOCS / "fleetune-device.service"
EXPOSURE_MAX = 20
"""Of 100, as ``systemd-analyze security --threshold`` counts."""


class Unit(configparser.RawConfigParser):
    def optionxform(self, name: str) -> str:
        return name


@pytest.fixture(scope="module")
def unit() -> Unit:
    parser = Unit(strict=False)
    parser.read(UNIT)
    return parser


@pytest.fixture
def systemd_analyze(tmp_path):
    """Ask it of the unit, with a program that is there."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (apt-get install systemd)")
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))

    def ask(*words: str) -> subprocess.CompletedProcess:
        command = ["systemd-analyze", *words, str(copy)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return ask


def test_systemd_finds_nothing_wrong_with_it(systemd_analyze):
    done = systemd_analyze("verify")
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_hardened(systemd_analyze):
    done = systemd_analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_watchdog_watches_it_and_it_is_started_again(unit):
    service = unit["Service"]
    assert (service["Type"], service["Restart"]) == ("notify", "on-failure")
    assert service["WatchdogSec"] == "10min"


def test_the_configuration_that_the_page_shows_is_taken(unit, tmp_path):
    page = (DOCS / "raspberry-pi.md").read_text()
    path = tmp_path / "device.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", page, re.DOTALL)[1])
    options = dict.fromkeys(list(inspect.signature(command).parameters)[1:])
    arguments = resolve(device, options, config=path, table="device", parts=DEVICE)
    assert arguments["state"] == Path("/var/lib") / unit["Service"]["StateDirectory"]
    assert load_rules(arguments["rules"]).temperature.max_c == 75
