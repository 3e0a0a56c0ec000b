"""A device in JavaScript that is killed at random moments, beside one in Python: nothing is lost, nothing is doubled.

FLEETUNE_KILLS is the number of kills of each.
"""

import os
import random
import sqlite3
import time
from contextlib import ExitStack

import pytest
from browser import needs_browser
from node_web import needs_page, needs_web
from processes import Processes
from safetensors.numpy import load_file
from web_federation import NodeDevice, PageDevice, furthest, own_options, websocket_server
from words import write_lines

from fleetune.toolkit.web import serving

KILLS = min(20, int(os.environ.get("FLEETUNE_KILLS", "20")))
ROUNDS = max(4, 2 * KILLS + 2)
"""Twice as many as kills: a browser that takes long to start lives through more of them."""
JOB = {
    "rounds": ROUNDS, "clients": 2, "min_clients": 2, "local_steps": 20, "batch_size": 8, "seed": 3, "deadline_s": 0,
    "gather_s": 600, "keep_versions": 0,
}  # fmt: skip
pytestmark = [needs_web, pytest.mark.faults]


class Ended:
    """What a job came to: the adapter, updates by task, and what the device in JavaScript says that left it."""

    def __init__(self, folder, left):
        self.adapter = load_file(folder / "run" / "adapter" / "adapter_model.safetensors")
        with sqlite3.connect(folder / "run" / "ledger.sqlite") as sql:
            self.counts = [n for (n,) in sql.execute("SELECT count(*) FROM updates GROUP BY task_id")]
        self.left = left


def job(folder, artifact, device_of, *, kills=0, seed=1):
    """A job of a device in Python and the one that ``device_of(folder, data, ws)`` makes, killed so often in its rounds."""
    folder.mkdir()
    data = {name: write_lines(folder / f"{name}.csv", seed=i) for i, name in enumerate("ab")}
    server, ws = websocket_server(folder)
    processes, rng, num = Processes(folder, artifact, hello_s=2.0), random.Random(seed), 0
    versions = folder / "run" / "versions"
    with server, ExitStack() as stack:
        stack.callback(processes.close)
        common = {"mqtt": server.url, "job": "words", "timeout_s": 600}
        processes.start("aggregator", "aggregate", common | {"out": str(folder / "run"), **JOB})
        own = own_options(folder, "a", data["a"])
        processes.start("a", "device", common | own)
        begun = time.monotonic()
        device = stack.enter_context(device_of(folder, data["b"], ws))
        span = time.monotonic() - begun  # of a start, on this machine now
        begun = time.monotonic()
        device.start()
        stack.callback(device.kill)
        while not processes.is_over("aggregator"):
            assert time.monotonic() < begun + 120 * (kills + ROUNDS), processes.log("aggregator")
            if num < kills and 2 * _done(versions) >= num * ROUNDS // kills:
                moment, latest = rng.uniform(0.0, 1.5 * span), (num + 1) * ROUNDS // kills - 1
                _wait(processes, moment, versions, latest)
                if _done(versions) >= latest:  # rounds are quicker than a start: a moment of this one
                    _wait(processes, rng.uniform(0.0, _round_s(versions)), versions, latest + 1)
                if not processes.is_over("aggregator"):
                    num += 1
                    device.kill()
                    device.start()
            time.sleep(0.02)
        processes.report("aggregator", timeout_s=60)
        left = device.ended()
    assert num == kills, "the job was over before all were killed"
    print(f"{num} kills, {ROUNDS} rounds, {time.monotonic() - begun:.0f} s, a start took {span:.1f} s")
    return Ended(folder, left)


def _wait(processes, seconds, versions, rounds):
    """Until the time is up, so many rounds are over, or all are."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and _done(versions) < rounds and not processes.is_over("aggregator"):
        time.sleep(0.01)


def _done(versions):
    """Rounds that are over."""
    return max(0, len(list(versions.glob("*.safetensors"))) - 1)


def _round_s(versions):
    """Seconds between the last two versions."""
    ends = sorted(path.stat().st_mtime for path in versions.glob("*.safetensors"))
    return ends[-1] - ends[-2]


class InNode(NodeDevice):
    """A device in Node, with its state in a file; ``ended`` are its verdicts."""

    def __init__(self, folder, data, ws, artifact):
        given = {"artifact": artifact, "data": data, "url": ws, "job": "words", "id": "b", "helloS": 2}
        super().__init__(
            folder, **given, terms={"least_effective": 0}, state=folder / "b.store", checkpointEvery=1
        )

    def __enter__(self):
        self.start()
        while "connected" not in self.kinds():
            time.sleep(0.02)
        self.kill()
        return self

    def __exit__(self, *_):
        self.kill()

    def ended(self):
        self.process.wait(120)
        return [line["verdict"] for line in self.events[-1]["left"]]


class InChromium(PageDevice):
    """A page in Chromium; ``ended`` are its verdicts."""

    def __init__(self, folder, data, ws, artifact):
        self._given, self._served = {"folder": folder, "data": data}, serving(artifact, mqtt=ws, job="words")

    def __enter__(self):
        url, _ = self._served.__enter__()
        super().__init__(**self._given, url=url, job="words", name="b")
        return self

    def __exit__(self, *_):
        self.kill()
        self._served.__exit__(None, None, None)

    def ended(self):
        self.kill()
        return ["accepted" if row.endswith("accepted") else row for row in reversed(self.left)]


@pytest.fixture(scope="module")
def calm(word_artifact, tmp_path_factory):
    """The same job with nobody killed, its second device in Node."""
    folder = tmp_path_factory.mktemp("calm") / "job"
    return job(folder, word_artifact, lambda *given: InNode(*given, word_artifact))


def check(ended, calm):
    assert ended.counts == [1] * (2 * ROUNDS) == calm.counts
    assert calm.left == ["accepted"] * ROUNDS
    # Of the last round the verdict may be lost with the device: the job is over then.
    assert (len(ended.left), ended.left[:-1]) == (ROUNDS, calm.left[:-1])
    assert furthest(ended.adapter, calm.adapter) < 1e-6
    print(f"furthest from the undisturbed adapter: {furthest(ended.adapter, calm.adapter):.1e}")


def test_node_killed_at_random_moments(calm, word_artifact, tmp_path):
    ended = job(tmp_path / "job", word_artifact, lambda *given: InNode(*given, word_artifact), kills=KILLS)
    check(ended, calm)


@needs_browser
@needs_page()
def test_chromium_killed_at_random_moments(calm, word_artifact, tmp_path):
    ended = job(
        tmp_path / "job", word_artifact, lambda *given: InChromium(*given, word_artifact), kills=KILLS
    )
    check(ended, calm)
