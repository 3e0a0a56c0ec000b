"""One fresh process that writes greedily on the device runtime; prints one JSON object.

Usage: device_generate.py ARTIFACT PROMPT COUNT THREADS WAY. PROMPT is how many tokens are read first, COUNT how many are written;
WAY is ``remember``, or ``again`` to run all tokens for each new one as artifacts of before do.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.decoding import Decoding, Recomputed
from fleetune.device_runtime.engine.engine import Engine

WARM = 8
"""Tokens written before anything is timed."""


def prompt_of(count: int, below: int) -> list[int]:
    """Ids that any model of so many tokens has, none of them special."""
    return [5 + 37 * i % (below - 5) for i in range(count)]


def main() -> None:
    """Write, and print tokens a second, the time to the first token, peak memory and the tokens."""
    folder, prompt, count, threads, way = sys.argv[1:]
    artifact = open_artifact(folder)
    below = artifact.manifest.features[0].below
    with open_engine(artifact, threads=int(threads)) as engine:
        write(_decoding(engine, artifact, way), prompt_of(int(prompt), below), WARM)
        times, ids = write(_decoding(engine, artifact, way), prompt_of(int(prompt), below), int(count))
    print(json.dumps(figures(times, ids)))


def write(decoding: Decoding, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
    """The likeliest tokens after ``prompt``, and when each was there, the start before them."""
    times, ids, given = [time.perf_counter()], [], prompt
    for _ in range(count):
        given = [int(decoding.feed(np.array([given]))[0].argmax())]
        ids += given
        times.append(time.perf_counter())
    return times, ids


def figures(times: list[float], ids: list[int]) -> dict[str, object]:
    """Tokens a second after the first, milliseconds to the first, peak memory in MB of 2**20 bytes, and the tokens."""
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    return {
        "tokens_per_s": (len(ids) - 1) / (times[-1] - times[1]),
        "first_ms": 1e3 * (times[1] - times[0]),
        "peak_mb": peak,
        "ids": ids,
    }


def _decoding(engine: Engine, artifact: Artifact, way: str) -> Decoding:
    if way == "again":
        return Recomputed(artifact.manifest, engine.predict_at, artifact.adapter())
    return engine.decode(artifact.adapter())


if __name__ == "__main__":
    main()
