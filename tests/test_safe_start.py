"""A user's folder may hold modules of any name: none of them is ours to import."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fleetune
from fleetune.toolkit.processes import fleet

ROOT = Path(fleetune.__file__).parents[1]
HOSTILE = (
    "toolkit/__init__.py", "broker.py", "device_runtime.py", "exporters.py", "fleetune.py", "numpy.py", "typer.py",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, full of modules that nobody may import; Python does not help."""
    for name in HOSTILE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit('{name} was imported')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def run(*words):
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_modules_are_hostile(folder):
    assert "numpy.py was imported" in run(sys.executable, "-c", "import numpy").stderr


def test_the_console_script_starts_beside_them(folder):
    script = Path(sys.executable).with_name("fleetune")
    refused = run(script, "train", "artifact", "--data", "d", "--out", "o")
    assert (refused.returncode, refused.stderr.startswith("fleetune: artifact: no artifact here")) == (
        1,
        True,
    )
    assert run(script, "aggregate", "--help").returncode == 0


def test_python_m_imports_no_more_than_fleetune_there(folder):
    (folder / "fleetune.py").unlink()
    refused = run(sys.executable, "-m", "fleetune", "train", "artifact", "--data", "d", "--out", "o")
    assert (refused.returncode, refused.stderr.startswith("fleetune: artifact: no artifact here")) == (
        1,
        True,
    )


def test_a_device_process_of_the_demo_starts_beside_them(folder):
    words = ["artifact", "--data", "d", "--mqtt", "mqtt://127.0.0.1:1", "--job", "home"]
    with fleet() as members:
        members.start("a", folder / "a", words)
        assert members.members[0].process.wait(60) == 1
    assert (folder / "a" / "log.txt").read_text().startswith("fleetune: artifact: no artifact here")


def test_the_public_door_is_open_beside_the_users_own_broker(folder):
    (folder / "numpy.py").unlink()
    (folder / "typer.py").unlink()
    (folder / "fleetune.py").unlink()
    (folder / "run.py").write_text(
        "from fleetune import Job, LocalWork, aggregate, train\nprint(train.__name__)\n"
    )
    done = run(sys.executable, "run.py")
    assert (done.stdout, done.stderr) == ("train\n", "")


def test_an_environment_of_the_user_is_kept(folder, monkeypatch):
    """The current folder goes only where Python put it by itself."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), str(folder / "mine"))))
    (folder / "mine").mkdir()
    (folder / "mine" / "sitecustomize.py").write_text("import sys; sys.stderr.write('mine\\n')\n")
    with fleet() as members:
        members.start("a", folder / "a", ["--help"])
        assert members.members[0].process.wait(60) == 0
    assert (folder / "a" / "log.txt").read_text() == "mine\n"
