"""What it costs the aggregator that somebody watches: its CPU share over a real Mosquitto, with and without, in turns."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.mosquitto import mosquitto
from benchmarks.measuring.processes import FOLDER
from benchmarks.rounds import JOB, hello_of
from fleetune.broker.service.watchers import tell_every_s
from fleetune.device_runtime.contracts.wire import (
    DeviceStatus,
    Look,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.link import Link

SIZES, REPEATS, WINDOW_S, LOOK_S = (8, 75, 1_000), 3, 10.0, 5.0
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Percent of a core by fleet, medians: nobody looks; one page is open and every device works and tells as it is asked to."""
    rows = [_of(size, repeats, say) for size in SIZES]
    for line in table(rows):
        say(line)
    return {"benchmark": "watching", "repeats": repeats, "window_s": WINDOW_S, "rows": rows}


def _of(size: int, repeats: int, say: Say) -> dict[str, Any]:
    shares: dict[str, list[float]] = {"alone": [], "watched": []}
    command = [sys.executable, "-m", "benchmarks.workers.watched_aggregator"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryDirectory() as folder, mosquitto(Path(folder)) as url:
        aggregator = subprocess.Popen([*command, url, str(size)], env=environment, **pipes)  # type: ignore[call-overload]
        try:
            _asked(aggregator)  # it hears nothing before it has connected
            with Link(url, client_id="fleet", topics=[aggregator_topic(JOB, "view")]) as link:
                for number in range(size):
                    hello = hello_of(number)
                    link.publish(device_topic(JOB, hello.device_id, "up"), encode(hello))
                while _asked(aggregator)[1] < size:
                    time.sleep(0.2)
                for _ in range(repeats):
                    shares["alone"].append(_share(aggregator, lambda: time.sleep(WINDOW_S)))
                    shares["watched"].append(_share(aggregator, lambda: _watch(link, size)))
        finally:
            aggregator.kill()
    medians = {f"{name}_percent": round(statistics.median(found), 3) for name, found in shares.items()}
    say(f"{size} devices: {medians}")
    cost = round(medians["watched_percent"] - medians["alone_percent"], 3)
    return {"devices": size, "tell_every_s": tell_every_s(size), **medians, "cost_percent": cost}


def _asked(aggregator: "subprocess.Popen[str]") -> tuple[float, int]:
    """CPU seconds of the aggregator until now, and how many devices it knows."""
    assert aggregator.stdin
    assert aggregator.stdout
    aggregator.stdin.write("?\n")
    aggregator.stdin.flush()
    seconds, number = aggregator.stdout.readline().split()
    return float(seconds), int(number)


def _share(aggregator: "subprocess.Popen[str]", during: Callable[[], object]) -> float:
    before, begun = _asked(aggregator)[0], time.monotonic()
    during()
    return 100 * (_asked(aggregator)[0] - before) / (time.monotonic() - begun)


def _watch(link: Link, size: int) -> None:
    """Look as a page does, and tell as so many devices that work do."""
    begun, told, looked = time.monotonic(), 0, 0
    pace = size / tell_every_s(size)
    while (past := time.monotonic() - begun) < WINDOW_S:
        if past >= looked * LOOK_S:
            link.publish(aggregator_topic(JOB, "look"), encode(Look()))
            looked += 1
        while told < past * pace:
            status = _status(hello_of(told % size).device_id)
            link.publish(device_topic(JOB, status.device_id, "status"), encode(status), retain=True)
            told += 1
        time.sleep(0.01)


def _status(name: str) -> DeviceStatus:
    at = {"phase": "training", "round": 1, "step": 3, "steps": 40, "step_s": 0.2, "left_s": 50.0}
    machine = {
        "memory_mb": 104.0,
        "temperature_c": 51.0,
        "mb_sent": 1.5,
        "mb_received": 2.5,
        "software": "0.2.0",
    }
    return DeviceStatus(device_id=name, online=True, session="a" * 16, **at, **machine)  # type: ignore[arg-type]
