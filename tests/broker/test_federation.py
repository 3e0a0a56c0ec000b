"""Real processes, a real Mosquitto, a real artifact, real SIGKILLs; the result is compared to the bit."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from itertools import pairwise, takewhile
from pathlib import Path

import children
import msgspec
import numpy as np
import plain_models
import pytest
import torch
from flat import aggregate, device
from pretended import PretendedSystem
from processes import Processes, environment
from safetensors.numpy import load
from servers import free_port
from waiting import until

from fleetune.broker.jobs.settings import Job
from fleetune.broker.jobs.work import device_seed, settings_of
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.strategy import Update
from fleetune.broker.service.choices import replay
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.arrays import load_arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.contracts.wire import DeviceStatus, decode, device_topic
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.link import Link
from fleetune.device_runtime.training.trainer import Trainer

NAMES = ("a", "b", "c", "d")
ROUNDS, STEPS, LR, SEQ_LEN = 3, 160, 0.01, 8
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "artifact"
    plain_models.export(plain_models.Classifier((0.2, 0.3)), folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i, name in enumerate((*NAMES, "e")):
        ids = rng.integers(0, plain_models.VOCABULARY, (30 + 10 * i, SEQ_LEN))
        labels = ids[:, 0] % plain_models.CLASSES
        np.savez(folder / f"{name}.npz", input_ids=ids, attention_mask=np.ones_like(ids), labels=labels)
    return folder


class Fleet(Processes):
    """An aggregator and devices of one job."""

    def __init__(self, root: Path, artifact: Path, data: Path, url: str) -> None:
        super().__init__(root, artifact)
        self.data, self.url = data, url

    def aggregate(self, **changes) -> None:
        options = {
            "rounds": ROUNDS, "clients": len(NAMES), "local_steps": STEPS, "lr": LR, "seq_len": SEQ_LEN,
            "policy": "exact-k", "drop": 0.5, "out": str(self.root / "run"), "evaluation_s": 30, **changes,
        }  # fmt: skip
        self.start("aggregator", "aggregate", options)

    def device(self, name: str, **changes) -> None:
        options = {
            "data": str(self.data / f"{name}.npz"), "id": name, "state": str(self.root / name), "threads": 1,
            "least_batch": 0, "least_effective": 0,  # all rows train, as in one process
            **changes,
        }  # fmt: skip
        self.start(name, "device", options)

    def devices(self, *, evaluate: bool = False) -> None:
        for name in NAMES:
            self.device(name)
        if evaluate:
            self.device("e", role="evaluate")

    def start(self, name: str, function: str, options: dict) -> None:
        super().start(name, function, {**options, "mqtt": self.url, "job": "plain"})

    def report(self, name: str, *, timeout_s: float = PATIENCE_S) -> dict:
        return super().report(name, timeout_s=timeout_s)

    def updated(self) -> set[str]:
        """Devices whose updates are kept and in no version yet; none before there is a ledger."""
        if not (self.root / "run/versions/00000.safetensors").exists():
            return set()
        with closing(sqlite3.connect(f"file:{self.root / 'run' / LEDGER}?mode=ro", uri=True)) as sql:
            rows = sql.execute("SELECT device FROM updates JOIN tasks USING (task_id) WHERE made IS NULL")
            return {device for (device,) in rows}

    def wait_for_updates(self, *names: str) -> None:
        until(lambda: self.updated() >= set(names), PATIENCE_S)

    def wait_for(self, *patterns: str) -> None:
        """Wait until every glob below the root matches something."""
        until(
            lambda: all(any(self.root.glob(pattern)) for pattern in patterns),
            PATIENCE_S,
            saying=lambda: f"no {patterns}: {self.log('aggregator')}",
        )

    def wait_for_log(self, name: str, words: str) -> None:
        until(lambda: words in self.log(name), PATIENCE_S, saying=lambda: self.log(name))


@contextmanager
def fleet_of(root: Path, artifact: Path, data: Path, url: str):
    fleet = Fleet(root, artifact, data, url)
    try:
        yield fleet
    finally:
        fleet.close()


@pytest.fixture
def fleet(tmp_path, artifact, data, mosquitto):
    with fleet_of(tmp_path, artifact, data, mosquitto.url) as running:
        yield running


@pytest.fixture(scope="module")
def expected(artifact, data):
    """The same rounds computed in this process; adapter of each version."""
    opened = open_artifact(artifact)
    adapter, versions = opened.adapter(), []
    sets = [load_dataset(data / f"{n}.npz", opened.manifest, opened.folder, seq_len=SEQ_LEN) for n in NAMES]
    with open_engine(opened, threads=1) as stack:
        for number in range(1, ROUNDS + 1):
            state = fedavg().init(adapter)
            for position, dataset in enumerate(sets):
                seed = device_seed(0, round_number=number, position=position)
                trainer = Trainer(stack, dataset, _work(seed), adapter)
                while not trainer.done:
                    trainer.step()
                values = {n: v.astype(np.float64) for n, v in trainer.adapter.items()}
                state = fedavg().add(state, Update(values, adapter, dataset.num_samples))
            adapter, _ = fedavg().finish(state, adapter, {})
            versions.append(adapter)
    return versions


def _work(seed: int) -> LocalWork:
    return LocalWork(
        policy=PolicySpec(name="exact-k", drop=0.5),
        optimizer=OptimizerSpec(lr=LR),
        steps=STEPS,
        seq_len=SEQ_LEN,
        seed=seed,
    )


def assert_as_expected(run: Path, expected) -> None:
    for version, wanted in enumerate(expected, 1):
        found = load((run / "versions" / f"{version:05d}.safetensors").read_bytes())
        assert {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in wanted.items()}
    adapter = load_arrays(run / "adapter" / "adapter_model.safetensors")
    assert all(adapter[name].tobytes() == value.tobytes() for name, value in expected[-1].items())


def retained(url: str) -> list[str]:
    """Topics of the job's statuses on which a message waits for those who come."""
    statuses = ["fleetune/v1/plain/+/status", "fleetune/v1/plain/+/+/status"]
    with Link(url, client_id="late", topics=[*statuses, "end"]) as link:
        link.publish("end", b"all that is retained has come by then")
        heard = iter(lambda: link.receive(20.0), None)
        return [topic for topic, _ in takewhile(lambda message: message[0] != "end", heard)]


def test_four_processes_over_mosquitto_give_what_one_process_gives(fleet, expected):
    fleet.aggregate()
    fleet.devices(evaluate=True)
    report = fleet.report("aggregator")
    assert (report["rounds"], [row["devices"] for row in report["history"]]) == (3, [0, 4, 4, 4])
    assert report["accuracy"] > report["history"][0]["accuracy"]
    assert 0 < report["bytes_up"] < report["link_bytes_received"]
    for name in NAMES:
        device = fleet.report(name)
        assert (device["rounds"], device["steps"]) == (3, 3 * STEPS)
        assert device["mean_active_layers"] == 1.0
    assert fleet.report("e")["evaluations"] == 4
    assert_as_expected(fleet.root / "run", expected)
    assert retained(fleet.url) == ["fleetune/v1/plain/aggregator/status"], (
        "no device leaves its status behind"
    )


@pytest.mark.slow
def test_a_job_that_chooses_and_is_killed_chooses_as_its_ledger_has_it(fleet):
    """What devices tell of their seconds differs from run to run: the same choices are those made anew from the ledger."""
    rounds = 50  # of four devices: long enough to try arms out
    options = {"policy": "auto", "drop": 0.0, "rounds": rounds, "local_steps": 10, "held_out": 0.2}
    fleet.aggregate(**options)
    fleet.devices()
    for version, killed in ((1, "b"), (3, "d"), (20, "a")):
        fleet.wait_for(f"run/versions/{version:05d}.safetensors")
        fleet.kill("aggregator")
        fleet.kill(killed)
        fleet.aggregate(**options)
        fleet.device(killed)
    report = fleet.report("aggregator")
    assert [sum(row["arms"].values()) for row in report["history"]] == [0, *[4] * rounds]
    lines = [json.loads(line) for line in (fleet.root / "run" / "choices.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * rounds
    assert all((line["gain"] is not None) == (line["round"] <= 0.7 * rounds) for line in lines)
    assert all(line["seconds"] > 0 for line in lines)
    assert "pilot" in {line["reason"].partition(":")[0] for line in lines}
    manifest = open_artifact(fleet.artifact)
    made = json.loads((fleet.root / "run" / "run.json").read_text())["arguments"]
    settings = settings_of(
        msgspec.convert(made["job"], Job),
        artifact=manifest.digest,
        work=msgspec.convert(made["work"], LocalWork),
        num_layers=manifest.manifest.num_layers,
    )
    with Ledger(fleet.root / "run", settings) as ledger:
        again = list(replay(ledger, settings))
    assert len(again) == 4 * rounds
    assert all((choice.work, choice.reason) == (task.work, task.reason) for task, choice in again)


def test_a_login_is_in_no_file_of_the_run(fleet):
    fleet.url = fleet.url.replace("://", "://operator:not%20for%20you@")
    fleet.aggregate(rounds=1)
    fleet.devices()
    fleet.report("aggregator")
    run = fleet.root / "run"
    assert json.loads((run / "run.json").read_text())["arguments"]["mqtt"].startswith("mqtt://127.0.0.1:")
    assert not [p for p in fleet.root.rglob("*") if p.is_file() and b"not for you" in p.read_bytes()]
    assert not [p for p in fleet.root.rglob("*") if p.is_file() and b"not%20for%20you" in p.read_bytes()]


def test_a_block_moves_on_from_round_to_round(fleet):
    """Two blocks of one layer, each for a round and a half."""
    fleet.aggregate(policy="cyclic", drop=0.5, period=STEPS * 3 // 2)
    fleet.devices()
    fleet.report("aggregator")
    versions = [load(path.read_bytes()) for path in sorted((fleet.root / "run/versions").iterdir())]
    changed = [{n for n in new if new[n].tobytes() != old[n].tobytes()} for old, new in pairwise(versions)]
    assert [{n.split(".")[1] for n in names if n.startswith("blocks.")} for names in changed] == [
        {"0"},
        {"0", "1"},
        {"1"},
    ]


def test_everything_is_killed_once_and_nothing_changes(fleet, mosquitto, expected):
    fleet.aggregate()
    fleet.devices()
    fleet.wait_for("d/work-*.safetensors")
    fleet.pause("d")
    fleet.wait_for_updates("a", "b", "c")

    fleet.kill("aggregator")
    fleet.kill("d")
    mosquitto.kill()
    mosquitto.start()
    fleet.aggregate()
    fleet.device("d")
    report = fleet.report("aggregator")
    assert (report["rounds"], [row["devices"] for row in report["history"]]) == (3, [0, 4, 4, 4])
    assert fleet.report("a")["rounds"] == 3
    assert fleet.report("d")["steps"] < 3 * STEPS, "it went on from its checkpoint"
    assert_as_expected(fleet.root / "run", expected)
    fleet.aggregate()
    again = fleet.report("aggregator")
    assert again["history"] == report["history"], "a finished job is not done again"


def test_a_device_that_pauses_in_its_round_stays_in_it(fleet, mosquitto, expected):
    system = PretendedSystem(fleet.root / "host")
    system.zone(90)
    rules = {"root": str(system.root), "temperature": {"max_c": 70}, "period_s": 0, "resume_after_s": 0}
    fleet.aggregate()
    for name in NAMES:
        fleet.device(name, **({"rules": rules} if name == "d" else {}))
    paused = DeviceStatus(device_id="d", online=True, paused="temperature 90.0 C is above 70 C")
    wait_for_status(mosquitto.url, "d", paused)
    fleet.wait_for_updates("a", "b", "c")
    fleet.wait_for_log("d", "round 1: offer")
    assert "d" not in fleet.updated()
    assert not list(fleet.root.glob("run/versions/00001*"))
    system.zone(50)
    report = fleet.report("aggregator")
    assert (report["rounds"], [row["devices"] for row in report["history"]]) == (3, [0, 4, 4, 4])
    device = fleet.report("d")
    assert (device["rounds"], device["pauses"]) == (3, 1)
    assert device["paused_s"] > 0
    assert_as_expected(fleet.root / "run", expected)


def test_sigterm_ends_a_paused_device_at_once_and_it_says_goodbye(artifact, data, tmp_path, mosquitto):
    system = PretendedSystem(tmp_path / "host")
    system.zone(90)
    (tmp_path / "device.toml").write_text(
        f"[rules]\nroot = '{system.root}'\ntemperature = {{ max_c = 70 }}\n"
        f"[device]\nmqtt = '{mosquitto.url}'\njob = 'plain'\nid = 'd'\nstate = '{tmp_path / 'state'}'\n"
    )
    words = [
        "device",
        str(artifact),
        "--data",
        str(data / "d.npz"),
        "--config",
        str(tmp_path / "device.toml"),
    ]
    command = [sys.executable, "-c", "from fleetune.toolkit.cli import main; main()", *words]
    with children.start(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            assert "connected: " in process.stdout.readline()
            assert process.stdout.readline().endswith(" round 0: paused: temperature 90.0 C is above 70 C\n")
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, err) == (143, "")
    wait_for_status(mosquitto.url, "d", DeviceStatus(device_id="d", online=False))


def wait_for_status(url: str, name: str, wanted: DeviceStatus) -> None:
    link = Link(url, client_id="watcher", topics=[device_topic("plain", name, "status")])
    link.open(PATIENCE_S)
    try:
        deadline, seen = time.monotonic() + PATIENCE_S, []
        while wanted not in seen:
            assert time.monotonic() < deadline, seen
            if message := link.receive(1.0):
                seen.append(msgspec.structs.replace(decode(message[1]), session=""))
    finally:
        link.close()


def test_a_restarted_server_brings_everyone_back(fleet, mosquitto, expected):
    fleet.aggregate()
    fleet.devices()
    fleet.wait_for("d/work-*.safetensors")
    mosquitto.kill()
    mosquitto.start()
    fleet.wait_for_log("aggregator", "round 2: asking")  # its updates' files may be gone before anyone looks
    mosquitto.kill()
    mosquitto.start()
    assert [row["devices"] for row in fleet.report("aggregator")["history"]] == [0, 4, 4, 4]
    assert fleet.report("d")["rounds"] == 3
    assert_as_expected(fleet.root / "run", expected)


def test_a_server_that_is_not_there_is_named(artifact, data, tmp_path):
    options = {"mqtt": f"mqtt://127.0.0.1:{free_port()}", "job": "plain", "timeout_s": 0.3}
    with pytest.raises(TransportError, match="no MQTT server answers"):
        aggregate(artifact, rounds=1, clients=1, out=tmp_path / "run", **options)
    with pytest.raises(TransportError, match="no MQTT server answers"):
        device(artifact, data=data / "a.npz", state=tmp_path / "state", **options)


def test_a_device_that_hears_nothing_stops_when_asked_to(artifact, data, tmp_path, mosquitto):
    options = {"mqtt": mosquitto.url, "job": "plain", "state": tmp_path / "state"}
    with pytest.raises(TransportError, match=r"no word of an aggregator for 0\.2 s"):
        device(artifact, data=data / "a.npz", idle_limit_s=0.2, **options)
    with OutboxFile(tmp_path / "state" / "outbox.sqlite") as outbox:
        made = outbox.recall("device_id")
    with pytest.raises(TransportError, match="no word"):
        device(artifact, data=data / "a.npz", idle_limit_s=0.2, **options)
    with OutboxFile(tmp_path / "state" / "outbox.sqlite") as outbox:
        assert outbox.recall("device_id") == made, "its name is made once and kept"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"codec": "zip"}, "no codec 'zip'; have: caesar, caesar-sign, caesar-zero, fp16"),
        ({"strategy": "best"}, "no strategy 'best'"),
        ({"policy": "lazy"}, "no policy 'lazy'"),
        ({"drop": 1.5, "policy": "exact-k"}, "drop"),
        ({"optimizer": "newton"}, "no optimizer 'newton'"),
        ({"clients": 2, "min_clients": 3}, "min_clients 3: from 1 to clients"),
        ({"job": "a/b"}, "job 'a/b'"),
        ({"mqtt": "http://x"}, "http"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(artifact, tmp_path, changes, said):
    options = {
        "mqtt": "mqtt://127.0.0.1:1",
        "job": "plain",
        "rounds": 1,
        "clients": 1,
        "out": tmp_path / "run",
    }
    with pytest.raises(ConfigError, match=said):
        aggregate(artifact, **{**options, **changes})
    assert not (tmp_path / "run").exists()


def test_two_processes_do_not_share_a_state_folder(fleet):
    fleet.device("a")
    fleet.wait_for("a/outbox.sqlite")
    fleet.running["first"] = fleet.running["a"]
    fleet.device("a")
    assert fleet.running["a"].wait(PATIENCE_S) == 1
    assert "StateError" in fleet.log("a")
    assert "another device process works here" in fleet.log("a")


def test_a_round_closes_at_its_deadline_without_a_device_that_died(fleet):
    fleet.aggregate(min_clients=3, rounds=1, deadline_s=6)
    fleet.devices()
    fleet.wait_for("d/work-*.safetensors")
    fleet.kill("d")
    report = fleet.report("aggregator")
    assert [row["devices"] for row in report["history"]] == [0, 3]
    assert "round 1 closes at its deadline without d" in fleet.log("aggregator")


def test_a_device_of_another_artifact_is_told_so(fleet, tmp_path):
    other = Path(shutil.copytree(fleet.artifact, tmp_path / "other"))
    manifest = json.loads((other / "manifest.json").read_bytes())
    (other / "manifest.json").write_text(json.dumps({**manifest, "name": "another"}))
    fleet.aggregate()
    fleet.artifact = other
    fleet.device("a")
    assert fleet.running["a"].wait(PATIENCE_S) == 1
    assert "ConfigError: the aggregator of job 'plain' cannot use this device: its artifact is" in fleet.log(
        "a"
    )


def test_masked_sums_over_mosquitto_with_kills_are_the_same_bits_as_on_the_bare_grid(
    artifact, data, tmp_path, mosquitto
):
    options = {"rounds": 2, "min_clients": 3, "secure_range": 0.5}
    runs = {}
    for how in ("grid", "masks"):
        (tmp_path / how).mkdir()
        with fleet_of(tmp_path / how, artifact, data, mosquitto.url) as fleet:
            fleet.aggregate(**options, secure=how)
            fleet.devices()
            if how == "masks":
                fleet.wait_for_log("aggregator", "round 1: masks are agreed on")
                fleet.kill("aggregator")
                fleet.kill("b")
                fleet.device("b")
                fleet.aggregate(**options, secure=how)
                fleet.wait_for("run/updates/train-1-*.bin")
                fleet.kill("aggregator")
                fleet.kill("c")
                fleet.aggregate(**options, secure=how)
                fleet.device("c")
            report = fleet.report("aggregator")
            assert [row["devices"] for row in report["history"]] == [0, 4, 4]
        runs[how] = [
            load((tmp_path / how / f"run/versions/0000{v}.safetensors").read_bytes()) for v in (1, 2)
        ]
    for plain, masked in zip(runs["grid"], runs["masks"], strict=True):
        assert {n: v.tobytes() for n, v in masked.items()} == {n: v.tobytes() for n, v in plain.items()}
