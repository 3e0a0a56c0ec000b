"""One fresh process that simulates a fleet on the tiny artifact; prints one JSON object.

Usage: simulated_fleet.py DEVICES CLIENTS ROUNDS.
"""

import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from fleetune.device_runtime.training.budget import resident_mb
from fleetune.toolkit.simulation.costs import Point
from fleetune.toolkit.simulation.simulate import simulate

ARTIFACT = Path(__file__).resolve().parents[2] / "tests" / "data" / "tiny_artifact"
ROUNDS = (1, 10, 50, 100)
"""After these rounds the resident memory is told."""
WORDS = ("red green blue grey", "cat dog cow hen", "saw nail glue drill")
FILE = """
name = "tiny"
artifact = "{artifact}"
rounds = {rounds}
clients = {clients}
[data]
train = "train.csv"
test = "test.csv"
[partition]
kind = "dirichlet"
devices = {devices}
min_samples = 2
[work]
steps = 2
batch_size = 4
"""


def write_lines(path: Path, count: int, *, seed: int) -> None:
    """Lines of the words that the artifact knows, labelled by their group."""
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for group in rng.integers(len(WORDS), size=count):
        lines.append(f"{' '.join(rng.choice(WORDS[group].split(), rng.integers(1, 9)))},{'abc'[group]}")
    path.write_text("\n".join(lines) + "\n")


def run(devices: int, clients: int, rounds: int, folder: Path) -> dict[str, float | str]:
    """Simulate, and return the figures."""
    write_lines(folder / "train.csv", 8 * devices, seed=0)
    write_lines(folder / "test.csv", 100, seed=1)
    (folder / "tiny.toml").write_text(
        FILE.format(artifact=ARTIFACT, devices=devices, clients=clients, rounds=rounds)
    )
    held_mb: dict[int, float] = {}
    start_s = time.process_time()
    report = simulate(
        folder / "tiny.toml",
        out=folder / "out",
        workers=1,
        charts=False,
        measure=lambda _: [Point(1, 0.01), Point(2, 0.01)],
        on_progress=lambda at: held_mb.update({at.round: resident_mb()}),
    )
    spent_s = time.process_time() - start_s
    return {
        "devices": devices,
        "clients": clients,
        "rounds": rounds,
        "device_round_ms": round(1e3 * spent_s / report.device_rounds, 2),
        **{f"mb_{number}": round(held_mb[number], 1) if number in held_mb else "" for number in ROUNDS},
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def main() -> None:
    """Run, and print what it took."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(*map(int, sys.argv[1:4]), Path(folder))))


if __name__ == "__main__":
    main()
