"""Rounds over links that lose, delay, double, narrow, part and cut: they complete, with the bits of a calm run."""

import json
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import children
import fleet
import linear_member
import pytest
from bad_link import BadLink, Cuts
from servers import Mosquitto

NUMBERS = (0, 1, 2)
SIZE = 80_000
"""Float32 values: an adapter as large as MiniLM's, 320 kB."""
MOST_UP, MOST_DOWN = 1.1, 1.2
"""Bytes carried over a slow link that nothing else ails, per byte needed."""


class Members:
    """An aggregator, three devices and an evaluating one, all of them behind what ``prefix`` begins."""

    def __init__(self, folder: Path, url: str, *, rounds: int, size: int, prefix: list[str] = []) -> None:  # noqa: B006
        self.folder, self.url, self.size, self.prefix = folder, url, size, prefix
        self.processes = {"aggregator": self._start("aggregator", rounds, len(NUMBERS), size)}
        self.processes |= {f"device-{n}": self._start("device", n, size) for n in (*NUMBERS, 9)}

    def _start(self, kind: str, *words: int) -> subprocess.Popen:
        name = kind if kind == "aggregator" else f"device-{words[0]}"
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [
                *self.prefix,
                sys.executable,
                linear_member.__file__,
                kind,
                self.url,
                self.folder,
                *words,
            ]
            return children.start(command, stdout=subprocess.PIPE, stderr=log)

    def end(self, timeout_s: float) -> dict:
        """What the aggregator tells at the end, and what came to the devices."""
        try:
            output, _ = self.processes["aggregator"].communicate(timeout=timeout_s)
            received = self._received()
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()
        assert self.processes["aggregator"].returncode == 0, (self.folder / "aggregator.log").read_text()[
            -3000:
        ]
        return {**json.loads(output), "down": received}

    def _received(self, timeout_s: float = 120) -> int:
        """Bytes of messages that came to all devices, which have heard that the job is over; 0 if one has not."""
        devices = [process for name, process in self.processes.items() if name != "aggregator"]
        try:
            told = [json.loads(process.communicate(timeout=timeout_s)[0]) for process in devices]
        except subprocess.TimeoutExpired:
            return 0
        print("    came to devices:", sum((Counter(one["kinds"]) for one in told), Counter()))
        return sum(one["received"] for one in told)


def calm_bits(rounds: int, size: int = SIZE) -> str:
    """SHA-256 of the last version of the same rounds computed directly."""
    settings = fleet.settings_of(rounds=rounds, clients=len(NUMBERS))
    return sha256(fleet.in_process(NUMBERS, rounds=rounds, settings=settings, size=size)).hexdigest()


def check(
    folder: Path, members: Members, *, rounds: int, size: int = SIZE, timeout_s: float, said: str
) -> dict:
    begun = time.monotonic()
    told = members.end(timeout_s)
    last = (folder / "aggregator" / "versions" / f"{rounds:05d}.safetensors").read_bytes()
    seconds = [row[1] for row in told["rows"][1:]]
    told["down"] /= 4 * size * (len(NUMBERS) * (rounds - 1) + rounds)  # version 0 is at hand
    told["up"] = told["received"] / (4 * size * len(NUMBERS) * rounds)
    print(f"{said}: {time.monotonic() - begun:.0f} s, rounds {seconds}, "
          f"down {told['down']:.2f}x, up {told['up']:.2f}x of what is needed")  # fmt: skip
    assert sha256(last).hexdigest() == calm_bits(rounds, size)
    return told


def behind(
    tmp_path: Path, *, rounds: int, size: int = SIZE, timeout_s: float, said: str, disturb=None, **weather
) -> tuple[BadLink, dict]:
    """Run a job all of whose members are behind a bad link; what was told, with ``up`` and ``down`` per byte needed."""
    with BadLink(**weather) as link, Mosquitto(tmp_path) as server:
        url = f"mqtt://{link.host}:{server.port}"
        members = Members(tmp_path, url, rounds=rounds, size=size, prefix=link.prefix)
        if disturb:
            disturb(link, members)
        told = check(tmp_path, members, rounds=rounds, size=size, timeout_s=timeout_s, said=said)
        print(
            f"    {link.packets} packets, {link.lost} lost, {link.bytes / 1e6:.2f} MB carried, {told['sent']} + {told['received']} bytes"  # noqa: E501
        )
        return link, told


@pytest.fixture
def server_for_all(monkeypatch):
    """A Mosquitto that listens on every address: its members are in another network namespace."""
    monkeypatch.setattr("servers.Mosquitto.__init__", _on_every_address(Mosquitto.__init__))


def _on_every_address(make):
    def made(self, folder, *lines, **options):
        make(self, folder, *lines, **options)
        text = self.configuration.read_text()
        self.configuration.write_text(
            text.replace(f"listener {self.port} 127.0.0.1", f"listener {self.port} 0.0.0.0")
        )

    return made


def test_a_link_that_loses_and_delays_completes_a_round(tmp_path, server_for_all):
    link, _ = behind(
        tmp_path, rounds=1, size=3000, timeout_s=120, said="10 % loss, 50 ms", loss=0.1, delay_s=0.05
    )
    assert link.lost > 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("said", "rounds", "timeout_s", "weather"),
    [
        ("calm", 3, 120, {}),
        ("10 % loss, 300 ms", 3, 600, {"loss": 0.1, "delay_s": 0.3}),
        ("30 % loss, 300 ms", 1, 1800, {"loss": 0.3, "delay_s": 0.3}),
        ("50 kB/s", 3, 900, {"bytes_s": 50e3}),
        ("10 kB/s", 2, 1200, {"bytes_s": 10e3}),
        ("5 kB/s", 1, 1200, {"bytes_s": 5e3}),
        ("20 % doubled, 50 ms", 3, 300, {"double": 0.2, "delay_s": 0.05}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_rounds_complete_behind_a_bad_link(tmp_path, server_for_all, said, rounds, timeout_s, weather):
    _, told = behind(tmp_path, rounds=rounds, timeout_s=timeout_s, said=said, **weather)
    if weather.keys() == {"bytes_s"}:
        assert (told["up"] < MOST_UP, told["down"] < MOST_DOWN) == (True, True)


@pytest.mark.faults
def test_rounds_complete_through_partitions(tmp_path, server_for_all):
    def part(link, members):
        for pause_s in (4.0, 6.0):
            time.sleep(pause_s)
            link.cut_until = time.monotonic() + 30.0
            time.sleep(30.0)

    behind(tmp_path, rounds=6, timeout_s=600, said="2 partitions of 30 s", disturb=part, bytes_s=400e3)


@pytest.mark.faults
@pytest.mark.parametrize("after", [(150_000, 250_000), (30_000, 90_000)], ids=str)
def test_rounds_complete_over_connections_that_are_cut(tmp_path, after):
    with Mosquitto(tmp_path) as server, Cuts(server.port, after=after) as cuts:
        members = Members(tmp_path, f"mqtt://127.0.0.1:{cuts.port}", rounds=3, size=SIZE)
        check(tmp_path, members, rounds=3, timeout_s=1200, said=f"cut after {after} bytes")
    print(f"    {cuts.resets} resets, {cuts.bytes / 1e6:.2f} MB carried")
    assert cuts.resets > 10
