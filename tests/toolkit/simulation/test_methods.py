"""Methods with memory of their own, simulated: the same bits whoever works, and after a kill in the middle."""

import os
import signal
import subprocess
import sys

import pytest
from paths import ROOT
from simulated import outcome, records, run, write_config

from fleetune.broker.methods.auto import Tuning

METHODS = {
    "head": ("job.head_start=class-mean",),
    "ptls": ("work.personal=1", "work.held_out=0.25"),
    "auto": ("job.configurator=auto", "work.held_out=0.25"),
    "caesar": (
        "job.traffic=caesar",
        "work.histogram=true",
        "clients=2",
        "networks.far.up_bytes_s=2e4",
        "networks.far.down_bytes_s=1e5",
    ),
    "all": ("job.head_start=class-mean", "job.configurator=auto", "work.personal=1", "work.held_out=0.25"),
}
ROUNDS, KILLED_AFTER = "rounds=5", 2
RUN = """
import os, signal, sys
from pathlib import Path
from simulated import run
path, out, rounds, *changes = sys.argv[1:]
def on(at):
    if at.round == int(rounds):
        os.kill(os.getpid(), signal.SIGKILL)
run(Path(path), out, *changes, on_progress=on)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("methods"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "all"] + ["all"]
)
def test_one_worker_two_workers_and_a_kill_give_the_same_bits(path, name):
    changes, folder = (ROUNDS, *METHODS[name]), path.parent
    run(path, f"{name}-1", *changes)
    whole = outcome(folder / f"{name}-1")
    run(path, f"{name}-2", *changes, workers=2)
    assert outcome(folder / f"{name}-2") == whole
    _run_until_killed(path, f"{name}-killed", *changes)
    assert not (folder / f"{name}-killed" / "run.json").exists()
    run(path, f"{name}-killed", *changes, resume=True)
    assert outcome(folder / f"{name}-killed") == whole


def test_the_methods_did_what_they_are_for(path, monkeypatch):
    monkeypatch.setattr("fleetune.broker.methods.auto.TUNING", Tuning(least=0, tail=0.0))
    run(path, "did", ROUNDS, *METHODS["all"])
    lines = records(path.parent / "did")
    assert len(lines[1]["choices"]) == 4  # the head is made by all
    assert all(
        choice["reason"] and choice["gain"] is not None for line in lines[2:] for choice in line["choices"]
    )
    run(path, "shared", ROUNDS, *(change for change in METHODS["all"] if "personal" not in change))
    shared = records(path.parent / "shared")
    assert sum(line["bytes_up"] for line in lines) < sum(line["bytes_up"] for line in shared)


def _run_until_killed(path, out, *changes):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, "-c", RUN, str(path), out, str(KILLED_AFTER), *changes]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
