"""A federation of a Mosquitto with WebSockets, Python's aggregator and devices, and one device in Node or in Chromium."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import children
import enrolled
import numpy as np
from browser import CHROMIUM
from node_web import NODE, WEB, run
from processes import Processes
from safetensors.numpy import load_file
from servers import Mosquitto, free_port
from words import write_lines

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
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


class NodeDevice:
    """``device.mjs`` as a process; ``events`` are what it has said."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self._path, self.log = folder / f"{options['id']}.json", folder / f"{options['id']}.events"
        self._options, self.process = options, None
        self.change()

    def change(self, **options: Any) -> "NodeDevice":
        """Give it other options from its next start on."""
        self._options |= options
        self._path.write_text(json.dumps(self._options, default=str))
        return self

    def start(self) -> "NodeDevice":
        with self.log.open("ab") as log:
            self.process = children.start(
                [NODE, WEB / "node" / "device.mjs", self._path], stdout=log, stderr=log
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


class PageDevice:
    """The page of ``url`` in a Chromium with a profile of its own, which has joined a job and joins again by itself."""

    def __init__(self, folder: Path, *, url: str, data: Path, job: str, name: str) -> None:
        self._folder, self._url, self.process = folder, url, None
        self._profile = folder / "profile"
        self._ask(lines=data.read_text(), join={"job": job, "name": name})

    def start(self) -> "PageDevice":
        with (self._folder / "chromium.log").open("ab") as log:
            command = [CHROMIUM, *_FLAGS, f"--user-data-dir={self._profile}", self._url]
            self.process = children.start(command, stdout=log, stderr=log)
        return self

    def kill(self) -> None:
        """Kill every process of this browser, by SIGKILL."""
        for folder in Path("/proc").iterdir():
            with suppress(OSError):  # it died with its parent
                if f"--user-data-dir={self._profile}\0".encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        if self.process:
            self.process.kill()
            self.process.wait()

    @property
    def left(self) -> list[str]:
        """Rows of the table of what left the device, newest first; no browser of this profile may be running."""
        return list(self._ask()["left"])

    def _ask(self, **more: Any) -> Any:
        path = self._folder / "join.json"
        given = {"url": self._url, "profile": self._profile, "chromium": CHROMIUM, **more}
        path.write_text(json.dumps(given, default=str))
        found = run("join.mjs", path)
        assert not found["trouble"], found
        return found


def websocket_server(folder: Path, authority: Path | None = None) -> tuple[Mosquitto, str]:
    """A Mosquitto and its WebSockets; all others speak TLS to it where there is an authority, the folder of one."""
    port, tls = free_port(), ()
    if authority:
        tls = (f"certfile {authority / 'server.crt'}", f"keyfile {authority / 'server.key'}")
    lines = ("allow_anonymous true", *tls, f"listener {port} 127.0.0.1", "protocol websockets")
    server = Mosquitto(folder, *lines)
    if authority:
        server.url = server.url.replace("mqtt:", "mqtts:")
    return server, f"ws://127.0.0.1:{port}"


def own_options(folder: Path, name: str, data: Path) -> dict[str, Any]:
    """What a device in Python is told that no other is; its state lies in ``folder``."""
    return {"data": str(data), "id": name, "state": str(folder / name), "threads": 1}


def federation(
    folder: Path,
    artifact: Path,
    job: dict[str, Any],
    *,
    node: dict[str, Any] | None,
    disturb=None,
    more: str = "",
    names: str = "ab",
    leaves: str = "",
    trust: Path | None = None,
    enrolls: bool = False,
):
    """The adapter of a job of devices ``a`` and ``b``, and ``b`` where that is in Node: with the options ``node``.

    ``more`` are further lines of ``b``; all ``names`` but ``b`` are Python's always. The device ``leaves`` is killed with its
    first update made and not sent. All pin the keys of ``trust``. Where it ``enrolls`` them, certificates vouch for their masks.
    """
    folder.mkdir()
    data = {name: write_lines(folder / f"{name}.csv", seed=seed) for seed, name in enumerate(names)}
    data["b"].write_text(data["b"].read_text() + more)
    authority, pairs = enrolled.authority_of(folder / "trust", names) if enrolls else (None, {})
    server, ws = websocket_server(folder, authority and authority.parent)
    processes, device = Processes(folder, artifact, hello_s=2.0), None
    with server:
        common = {"mqtt": server.url, "job": "words", "timeout_s": 120}
        common |= {"ca_file": str(authority)} if authority else {}
        processes.start("aggregator", "aggregate", common | {"out": str(folder / "run"), **JOB, **job})
        try:
            for name in names if node is None else names.replace("b", ""):
                own = own_options(folder, name, data[name])
                own |= {"trust": str(trust)} if trust else {}
                if enrolls:
                    own |= pairs[name]._asdict()  # and, by their --ca-file, they demand others'
                processes.start(name, "device", common | own, module="leaving" if name == leaves else "flat")
            if node is not None:
                given = {
                    "artifact": artifact,
                    "data": data["b"],
                    "url": ws,
                    "job": "words",
                    "id": "b",
                    "helloS": 2,
                    "leaves": leaves == "b",
                    "trust": trust,
                }
                if enrolls:
                    given |= {
                        "certificate": pairs["b"].cert,
                        "key": pairs["b"].key,
                        "maskAuthority": authority,
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
