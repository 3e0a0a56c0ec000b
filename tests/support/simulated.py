"""A small simulation on the tiny artifact: its file, known step times, and its records without what is not repeated."""

import json
from pathlib import Path

from paths import ROOT
from words import write_lines

from fleetune.toolkit.simulation.costs import Point
from fleetune.toolkit.simulation.simulate import simulate

TINY = ROOT / "tests" / "data" / "tiny_artifact"
SECONDS = 0.5
"""Of every step, whatever its kind."""

FILE = """
name = "tiny"
artifact = "{artifact}"
rounds = 3
clients = 3
[data]
train = "train.csv"
test = "test.csv"
[partition]
kind = "dirichlet"
devices = 4
min_samples = 8
[work]
steps = 4
batch_size = 8
[fleet.profiles]
quick = 0.5
slow = 0.5
[profiles.quick]
slowdown = 1.0
active_w = 2.0
[profiles.slow]
slowdown = 3.0
active_w = 2.0
[network]
model = "far"
[networks.far]
down_bytes_s = 1e12
up_bytes_s = 1e12
latency_s = 0.25
"""


def write_config(folder: Path, text: str = FILE) -> Path:
    """Data and configuration in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.csv")
    write_lines(folder / "test.csv", seed=1)
    path = folder / "simulation.toml"
    path.write_text(text.format(artifact=TINY))
    return path


def constant(sample):
    """Every step takes half a second, but that of the head alone, which bounds the others from below."""
    seconds = SECONDS if any(sample.call.plan) or not sample.call.is_step else SECONDS / 1000
    return [Point(1, seconds), Point(2, seconds)]


def run(path: Path, out: str, *overrides: str, **options):
    """Simulate into ``out`` beside the file, in this process; returns the report."""
    options = {"workers": 1, "measure": constant, "charts": False, **options}
    return simulate(path, out=path.parent / out, set=overrides, **options)


def records(folder: Path) -> list[dict]:
    """Rounds, without the time that simulating them took."""
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "wall_s"} for line in lines]


def devices(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "devices.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> tuple:
    """All that must not differ between two runs of one simulation."""
    return records(folder), devices(folder), (folder / "adapter" / "adapter_model.safetensors").read_bytes()
