"""Mosquitto with WebSockets, an aggregator, a device in Python and one in Node: the adapter of two Python devices."""

import json
import time
from pathlib import Path
from typing import Any

import children
import numpy as np
import pytest
from node_web import NODE, WEB, needs_web
from processes import Processes
from safetensors.numpy import load_file
from servers import Mosquitto, free_port
from words import write_lines

pytestmark = [needs_web, pytest.mark.slow]
JOB = {
    "rounds": 3,
    "clients": 2,
    "min_clients": 2,
    "local_steps": 6,
    "batch_size": 8,
    "seed": 3,
    "deadline_s": 300,
    "gather_s": 120,
}
TIMEOUT_S = 300


class NodeDevice:
    """``device.mjs`` as a process; ``events`` are what it has said."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._options, self.log = folder / f"{options['id']}.json", folder / f"{options['id']}.events"
        self._options.write_text(json.dumps(options, default=str))
        self.process = None

    def start(self) -> "NodeDevice":
        with self.log.open("ab") as log:
            self.process = children.start(
                [NODE, WEB / "node" / "device.mjs", self._options], stdout=log, stderr=log
            )
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def events(self) -> list[dict[str, Any]]:
        whole = self.log.read_text() if self.log.exists() else ""
        return [
            json.loads(line) for line in whole.splitlines() if line.startswith("{") and line.endswith("}")
        ]

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events]


def _server(folder: Path) -> tuple[Mosquitto, str]:
    port = free_port()
    lines = ("allow_anonymous true", f"listener {port} 127.0.0.1", "protocol websockets")
    return Mosquitto(folder, *lines), f"ws://127.0.0.1:{port}"


def federation(
    folder: Path, artifact: Path, job: dict[str, Any], *, node: dict[str, Any] | None, disturb=None
):
    """The adapter of a job of devices ``a`` and ``b``, and ``b`` where that is in Node: with the options ``node``."""
    folder.mkdir()
    data = {name: write_lines(folder / f"{name}.csv", seed=seed) for seed, name in enumerate("ab")}
    server, ws = _server(folder)
    processes, device = Processes(folder, artifact, hello_s=2.0), None
    with server:
        common = {"mqtt": server.url, "job": "words", "timeout_s": 120}
        processes.start("aggregator", "aggregate", common | {"out": str(folder / "run"), **JOB, **job})
        try:
            for name in "ab" if node is None else "a":
                own = {"data": str(data[name]), "id": name, "state": str(folder / name), "threads": 1}
                processes.start(name, "device", common | own)
            if node is not None:
                given = {
                    "artifact": artifact,
                    "data": data["b"],
                    "url": ws,
                    "job": "words",
                    "id": "b",
                    "helloS": 2,
                }
                device = NodeDevice(folder, **given, terms={"least_effective": 0}, **node).start()
            deadline = time.monotonic() + TIMEOUT_S
            while not processes.is_over("aggregator"):
                assert time.monotonic() < deadline, processes.log("aggregator")
                if disturb:
                    disturb(device)
                time.sleep(0.02)
            processes.report("aggregator", timeout_s=60)
            if device:
                device.process.wait(60)
        finally:
            processes.close()
            if device:
                device.kill()
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors"), device


def furthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


@pytest.mark.parametrize(
    "job",
    [
        {},
        {"codec": "int8"},
        {"codec": "quant", "codec_bits": 4, "policy": "bernoulli", "drop": 0.5},
        {"codec": "topk", "codec_ratio": 0.3, "down_codec": "xor"},
    ],
    ids=["fp32", "int8", "quant", "topk and xor"],
)
def test_a_page_device_gives_what_a_python_device_gives(job, word_artifact, tmp_path):
    expected, _ = federation(tmp_path / "python", word_artifact, job, node=None)
    found, device = federation(tmp_path / "node", word_artifact, job, node={})
    # Coded steps may fall on the other side of a border, where two runtimes round otherwise.
    limit = 1e-6 if not job else 2e-3
    assert furthest(found, expected) < limit
    kinds = device.kinds()
    assert kinds.count("accepted") == 3
    assert "declined" not in kinds
    assert "refused" not in kinds
    ended = device.events[-1]
    assert ended["kind"] == "ended"
    assert [line["verdict"] for line in ended["left"]] == ["accepted"] * 3


def test_a_connection_that_breaks_loses_and_doubles_nothing(word_artifact, tmp_path):
    """Cut after an offer, in a run, and with an update under way."""
    expected, _ = federation(tmp_path / "python", word_artifact, {}, node=None)
    cuts = ["offer", "step", "trained", "sent"]
    found, device = federation(tmp_path / "node", word_artifact, {}, node={"cutAt": cuts})
    assert furthest(found, expected) < 1e-6
    assert device.events[-1]["connections"] >= 4
    assert device.kinds().count("accepted") == 3


def test_a_device_that_is_killed_goes_on(word_artifact, tmp_path):
    """SIGKILL in a run, which goes on from its checkpoint, and with an update made: nothing acknowledged is lost or doubled."""
    expected, _ = federation(tmp_path / "python", word_artifact, {}, node=None)
    pending = [("step", 4), ("trained", 1)]

    def disturb(device):
        kinds = device.kinds()
        if pending and kinds.count(pending[0][0]) >= pending[0][1]:
            pending.pop(0)
            device.kill()
            device.start()

    node = {"state": tmp_path / "b.store", "checkpointEvery": 1}
    found, device = federation(tmp_path / "node", word_artifact, {}, node=node, disturb=disturb)
    assert not pending
    assert furthest(found, expected) < 1e-6
    assert "restored" in device.kinds()
    assert [line["verdict"] for line in device.events[-1]["left"]] == ["accepted"] * 3


def test_what_the_owner_does_not_allow_or_the_engine_cannot_is_declined(word_artifact, tmp_path):
    """A job whose work a page does not do ends for it with a reason, and not with a hang."""
    server, ws = _server(tmp_path)
    processes = Processes(tmp_path, word_artifact, hello_s=2.0)
    data = write_lines(tmp_path / "b.csv")
    with server:
        common = {"mqtt": server.url, "job": "words", "timeout_s": 120}
        job = JOB | {"clients": 1, "min_clients": 1, "rounds": 1, "personal": 1}
        processes.start("aggregator", "aggregate", common | {"out": str(tmp_path / "run"), **job})
        given = {"artifact": word_artifact, "data": data, "url": ws, "job": "words", "id": "b", "helloS": 2}
        device = NodeDevice(tmp_path, **given).start()
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while "declined" not in device.kinds():
                assert time.monotonic() < deadline, device.log.read_text()
                time.sleep(0.02)
        finally:
            processes.close()
            device.kill()
    said = next(event["text"] for event in device.events if event["kind"] == "declined")
    assert "1 personal layers" in said


def test_a_server_without_websockets_or_with_logins_is_one_sentence(word_artifact, tmp_path, mosquitto):
    data = write_lines(tmp_path / "b.csv")
    url = mosquitto.url.replace("mqtt://", "ws://")
    given = {"artifact": word_artifact, "data": data, "job": "words", "id": "b"}
    for number, (own, said) in enumerate(
        [(url, "protocol websockets"), (mosquitto.url, "cannot speak mqtt://")]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        device = NodeDevice(folder, **given, url=own, timeoutS=3).start()
        device.process.wait(60)
        last = device.events[-1]
        assert last["name"] == "TransportError"
        assert said in last["text"]
