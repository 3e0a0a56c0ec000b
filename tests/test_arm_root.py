"""``make arm-env`` where it cannot: it says why on one line, and nothing fails."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "support" / "make_arm_root.sh"


@pytest.fixture
def make(tmp_path):
    """Run it where these are the first programs, by name, that a shell finds."""

    def run(programs, *, others=os.defpath):
        (tmp_path / "bin").mkdir()
        for name, lines in programs.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        command = ["/bin/sh", str(SCRIPT), "pip", str(tmp_path / "root")]
        environment = {"PATH": f"{tmp_path / 'bin'}:{others}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", check=True)

    return run


DPKG = {"dpkg": "echo amd64"}
MIRROR = 'case "$*" in *indextargets*) echo http://mirror.invalid/debian/;; *) exit 100;; esac'


@pytest.mark.parametrize(
    ("programs", "others", "reason"),
    [
        ({}, "/nowhere", "it is made of Debian packages, and here is no apt"),
        (
            {"apt-get": "echo http://mirror.invalid/ubuntu/", **DPKG},
            os.defpath,
            "apt has no Debian mirror among its sources",
        ),
        ({"apt-get": MIRROR, **DPKG}, os.defpath, "apt could not fetch the emulator"),
    ],
    ids=["no apt", "not Debian", "no network"],
)
def test_it_says_why_it_cannot(make, tmp_path, programs, others, reason):
    done = make(programs, others=others)
    last = done.stdout.splitlines()[-1]
    assert last == f"no ARM environment: {reason}; the tests that need it will be skipped"
    assert not (tmp_path / "root" / "arm.stamp").exists()
