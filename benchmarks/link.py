"""The link over a real Mosquitto: round trip of 40 bytes, and 0.3, 3 and 50 MB pulled, with and without Nagle's algorithm."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.mosquitto import mosquitto
from benchmarks.measuring.processes import FOLDER
from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.wire import Chunk, UpdateReady, decode, encode
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network import client
from fleetune.device_runtime.network.link import Link

REPEATS, PINGS = 7, 50
SIZES = (300_000, 3_000_000, 50_000_000)
DOWN, UP = "bench/link/down", "bench/link/up"
_WAIT_S = 60.0
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS) -> dict[str, Any]:
    """Medians of interleaved repeats: milliseconds, and MB/s of the transfers; ``nagle``: without TCP_NODELAY at either end."""
    found: dict[str, dict[str, list[float]]] = {"nodelay": {}, "nagle": {}}
    with tempfile.TemporaryDirectory() as folder, mosquitto(Path(folder)) as url:
        for number in range(repeats):
            for mode, times in found.items():
                with _connected(url, mode) as link:
                    for what, seconds in _times(link):
                        times.setdefault(what, []).append(1000 * seconds)
            say(f"repeat {number + 1} of {repeats}")
    rows = [_row(what, {mode: times[what] for mode, times in found.items()}) for what in found["nodelay"]]
    for line in table(rows):
        say(line)
    return {"benchmark": "link", "repeats": repeats, "rows": rows}


def _times(link: Link) -> Iterator[tuple[str, float]]:
    pings = [_timed(lambda: _ping(link)) for _ in range(PINGS)]
    yield "40 bytes there and back", statistics.median(pings)
    for size in SIZES:
        yield f"{size / 1e6:g} MB", _timed(lambda size=size: _download(link, size))


def _row(what: str, times: dict[str, list[float]]) -> dict[str, Any]:
    ms = {mode: round(statistics.median(values), 2) for mode, values in times.items()}
    size_mb = float(what.removesuffix(" MB")) if what.endswith(" MB") else None
    return {
        "": what,
        "nagle_ms": ms["nagle"],
        "ms": ms["nodelay"],
        "nagle_mb_s": round(1000 * size_mb / ms["nagle"], 1) if size_mb else None,
        "mb_s": round(1000 * size_mb / ms["nodelay"], 1) if size_mb else None,
    }


@contextmanager
def _connected(url: str, mode: str) -> Iterator[Link]:
    """A link to a process that answers; both with Nagle's algorithm or both without."""
    command = [sys.executable, str(FOLDER / "workers" / "link_far.py"), url, mode, *map(str, SIZES)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    far = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    send_at_once = client._send_at_once
    try:
        if mode == "nagle":
            client._send_at_once = lambda *_: None
        far.stdout.readline()  # type: ignore[union-attr]
        with Link(url, client_id="near", topics=[UP]) as link:
            yield link
    finally:
        client._send_at_once = send_at_once
        far.kill()
        far.communicate()


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ping(link: Link) -> None:
    link.publish(DOWN, bytes(40))
    _next(link)


def _download(link: Link, size_bytes: int) -> None:
    """Ask for content of a size, and pull it."""
    link.publish(DOWN, b"%d" % size_bytes)
    announced = decode(_next(link))
    if not isinstance(announced, UpdateReady):
        raise ConfigError("the other end says something else")
    pull = Pull(announced.payload, size_bytes_max=size_bytes, now=time.monotonic())
    while not pull.done:
        if request := pull.due(time.monotonic()):
            link.publish(DOWN, encode(request))
        chunk = decode(_next(link))
        if isinstance(chunk, Chunk):
            pull.add(chunk, time.monotonic())
    pull.content()


def _next(link: Link) -> bytes:
    if (message := link.receive(_WAIT_S)) is None:
        raise ConfigError(f"nothing came in {_WAIT_S:g} s")
    return message[1]
