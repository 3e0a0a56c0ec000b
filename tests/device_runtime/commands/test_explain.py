"""What ``fleetune device --explain`` tells the owner, and the data that a device spares."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from fleetune.device_runtime.commands import device
from fleetune.device_runtime.commands.systemd import Notifier
from fleetune.device_runtime.contracts.accounting import Steps
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.files import DiskFiles
from fleetune.device_runtime.network.signing import Trusted, read_public, write_key_pair
from fleetune.device_runtime.terms.account import Account
from fleetune.device_runtime.terms.left import Left, Record
from fleetune.device_runtime.terms.terms import Terms
from fleetune.toolkit.cli import app


def said(*arguments):
    return CliRunner().invoke(app, ["device", *map(str, arguments)])


def test_each_limit_is_shown_with_its_value_and_what_left(word_artifact, tmp_path):
    Record(DiskFiles(tmp_path)).add(
        Left(when="2027-01-15T08:00:00Z", job="home", round=7, task_id="t", kind="update", samples=32, bytes=900)
    )  # fmt: skip
    found = said(
        word_artifact, "--explain", "--state", tmp_path, "--least-batch", 12, "--must-stay", "head.*"
    )
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert "least_batch: 12: samples in every step that a layer learns from" in found.stdout
    assert any(line.startswith("least_samples: 8 (default): ") for line in lines)
    assert "stays: head.weight, head.bias" in lines
    assert lines[-1].endswith("job home round 7: update of 32 samples, 900 bytes, no verdict yet")
    assert len([line for line in lines if line.split(":")[0] in Terms.__struct_fields__]) == len(
        Terms.__struct_fields__
    )


def test_it_reads_the_devices_own_file_and_changes_nothing(word_artifact, tmp_path):
    own = tmp_path / "device.toml"
    own.write_text('[device]\ndata = "mine.jsonl"\njob = "home"\nmqtt = "mqtt://here"\nleast_batch = 12\n')
    found = said(word_artifact, "--explain", "--config", own, "--state", tmp_path / "none", "--json")
    values = {limit["name"]: limit["value"] for limit in json.loads(found.stdout)["limits"]}
    assert values["least_batch"] == "12"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--most-change", "nan", "most_change must be"), ("--most-change", "1e300", "most_change must be at most 1000000"),
     ("--least-samples", "-1", "least_samples must be at least 0"), ("--may-leave", "heads", "no tensor is called so"),
     ("--policies", "newton", "no policy 'newton'; have: bernoulli")],
)  # fmt: skip
def test_a_limit_that_is_none_is_told_in_one_line(word_artifact, option, value, message):
    found = said(word_artifact, "--explain", f"{option}={value}")
    assert found.exit_code == 1
    assert message in found.stderr
    assert found.stderr.count("\n") == 1


def test_rows_that_would_make_a_batch_too_short_do_not_train(word_artifact, word_file, tmp_path):
    class Machine:
        def trainer(self, rows, work, adapter, *, class_weights, secret):
            return [len(batch) for batch in rows.epoch_batches(0, 0, work.batch_size)]

    def batches(least_batch):
        artifact, terms = open_artifact(word_artifact), Terms(least_batch=least_batch)
        options = {"kept": None, "own": tmp_path, "files": DiskFiles(tmp_path), "terms": terms}
        desk = device._Desk(
            artifact, word_file, Columns(), Machine(), Notifier({}), lambda _: None, **options
        )
        return np.sort(desk.workbench(tells_labels=False).start(LocalWork(batch_size=17), {})).tolist()

    assert batches(0) == [1, *[17] * 7]
    assert batches(8) == [17] * 7


def test_it_says_whose_work_is_taken(word_artifact, tmp_path):
    anybody = said(word_artifact, "--explain")
    assert anybody.stdout.startswith(
        "jobs: anybody who can write to the MQTT server can give this device work"
    )
    write_key_pair(tmp_path / "key", tmp_path / "pub")
    named = said(word_artifact, "--explain", "--trust", tmp_path / "pub")
    name = Trusted(read_public(tmp_path / "pub")).names
    assert named.stdout.startswith(f"jobs: work is taken if this key signed it: {name}\n")
    wrong = said(word_artifact, "--explain", "--trust", tmp_path / "key")
    assert (wrong.exit_code, wrong.stderr.count("\n")) == (1, 1)
    assert "holds a private key; expected public keys alone" in wrong.stderr


def test_it_says_what_the_data_has_spent(word_artifact, tmp_path):
    found = said(word_artifact, "--explain", "--state", tmp_path)
    assert "epsilon 2." not in found.stdout
    account = Account(DiskFiles(tmp_path))
    account.put_down(Steps(1.5, 0.1, 30), "key", most=8.0, delta=1e-5)
    found = said(word_artifact, "--explain", "--state", tmp_path, "--most-epsilon", 3)
    assert "30 steps that hide each sample: epsilon 2.296 at delta 1e-05, 3 at most" in found.stdout
    shared = said(word_artifact, "--explain", "--account", tmp_path)
    assert "30 steps that hide each sample" in shared.stdout
