"""What a device keeps and what devices sent is its owner's alone, whatever the umask; what is meant to be read stays so."""

import os
import stat

import pytest
from background import begin
from flat import FEW_SAMPLES

from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.arrays import PRIVATE, write_atomically
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.files import DiskFiles


@pytest.fixture
def open_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


def read_by_others(folder):
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and mode_of(path) & 0o077
    }


def test_of_a_devices_state_and_an_aggregators_folder(
    open_umask, mosquitto, word_artifact, word_file, tmp_path
):
    """The state folder is one that its owner made, open to all."""
    (tmp_path / "state").mkdir(mode=0o755)
    serving = begin(
        aggregate, word_artifact, mqtt=mosquitto.url, job=Job("home", rounds=2, clients=1, strategy="own-last"),
        work=LocalWork(steps=2, batch_size=4, codec="int8", personal=1), out=tmp_path / "run",
    )  # fmt: skip
    device(
        word_artifact, data=word_file, mqtt=mosquitto.url, job="home", id="pi", state=tmp_path / "state",
        resources=Resources(threads=1), terms=FEW_SAMPLES,
    )  # fmt: skip
    serving.result(60)
    left = read_by_others(tmp_path / "state")
    assert {name for name in left if not name.startswith("personal/")} <= {"lock"}
    assert (tmp_path / "state" / "outbox.sqlite").is_file()
    run = read_by_others(tmp_path / "run")
    assert {"adapter/adapter_model.safetensors", "run.json", "versions/00002.safetensors"} <= run
    assert not {name for name in run if "sqlite" in name or ".state." in name or name.startswith("updates/")}
    assert mode_of(tmp_path / "run" / "ledger.sqlite") == 0o600
    assert list((tmp_path / "run" / "versions").glob("*.state.safetensors"))


def test_what_an_older_release_left_open_is_shut(open_umask, tmp_path):
    outbox, log = tmp_path / "outbox.sqlite", tmp_path / "left.jsonl"
    for path in (outbox, log):
        path.touch(0o644)
    OutboxFile(outbox).close()
    DiskFiles(tmp_path).append("left.jsonl", b"x")
    assert (mode_of(outbox), mode_of(log)) == (0o600, 0o600)


def test_a_part_that_a_kill_left_open_does_not_open_a_key(open_umask, tmp_path):
    (tmp_path / ".key.part").touch(0o644)
    write_atomically(tmp_path / "key", b"secret", mode=PRIVATE)
    assert mode_of(tmp_path / "key") == 0o600
    write_atomically(tmp_path / "adapter", b"for all")
    assert mode_of(tmp_path / "adapter") == 0o644
