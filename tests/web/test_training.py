"""Runs of the JavaScript trainer against Python's: the same draws, batches and rounding give the same losses."""

import gzip
import json
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from node_web import needs_web, train
from safetensors.numpy import load_file

from fleetune.device_runtime.commands.train import train as train_here
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork

pytestmark = needs_web
WORKS = {
    "full, clipped, warmed up": {"optimizer": {"clip_norm": 0.5, "warmup_steps": 3, "decay": "cosine"}},
    "bernoulli, SGD": {"policy": {"name": "bernoulli", "drop": 0.5}, "optimizer": {"name": "sgd", "lr": 0.1}},
    "gates by row": {"policy": {"name": "exact-k", "drop": 0.5, "gates": "row"}},
    "bypassed, decayed": {
        "policy": {"name": "dropbp", "drop": 0.5, "width": 3},
        "optimizer": {"weight_decay": 0.1, "proximal": 0.1},
    },
    "accumulated": {"micro_tokens": 16, "policy": {"name": "suffix", "drop": 0.5}},
}
LORA_WORKS = {
    "bare": {"policy": {"name": "coto", "drop": 0.5}},
    "lower rank, pulled back": {"rank": 3, "optimizer": {"weight_decay": 0.1, "proximal": 0.2}},
    "lower rank, A frozen": {"rank": 2, "frozen": "lora-a", "optimizer": {"weight_decay": 0.1}},
}
OTHERWISE = ["recomputed", "copied, tables in the graph", "recomputed, copied, tables as inputs"]
"""``bernoulli, SGD`` again: as recomputed layers have it, and where nothing stays in WebAssembly's memory."""
STEPS = {"steps": 8, "batch_size": 8, "seed": 5}


def reference(artifact, data, work, out: Path):
    """Losses and adapter of ``fleetune train``."""
    losses: list[float] = []
    train_here(
        artifact,
        data=data,
        out=out,
        work=msgspec.convert(work, LocalWork),
        resources=Resources(threads=1),
        on_step=lambda step: losses.append(step.loss),
    )
    return losses, load_file(out / "adapter" / "adapter_model.safetensors")


def furthest(found, expected):
    """Largest difference of two adapters."""
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[name] - expected[name]).max()) for name in expected)


@pytest.fixture(scope="module")
def made(word_artifact, word_file, tmp_path_factory):
    """What Node makes of every work, in one process: results, and the folder of the adapters."""
    folder = tmp_path_factory.mktemp("node")
    runs = [
        {"data": word_file, "work": STEPS | work, "adapter": folder / f"{name}.safetensors", "stopAt": 5}
        for name, work in WORKS.items()
    ]
    again = {"data": word_file, "work": STEPS | WORKS["bernoulli, SGD"]}
    others = [{"savedLayers": 0}, {"copies": True}, {"savedLayers": 0, "copies": True, "bakes": False}]
    found = train(folder, word_artifact, [*runs, *[again | other for other in others]])
    return dict(zip([*WORKS, *OTHERWISE], found, strict=True)), folder


@pytest.mark.parametrize("name", WORKS)
def test_losses_and_adapter_are_those_of_python(name, made, word_artifact, word_file, tmp_path):
    """Stopped in the middle, saved, and taken up again."""
    found, folder = made
    losses, adapter = reference(word_artifact, word_file, STEPS | WORKS[name], tmp_path / "run")
    assert np.allclose(found[name]["losses"], losses, rtol=0, atol=2e-6)
    assert furthest(load_file(folder / f"{name}.safetensors"), adapter) < 2e-5


@pytest.mark.parametrize("how", OTHERWISE)
def test_how_a_step_is_computed_changes_nothing_beyond_rounding(how, made):
    found, _ = made
    assert np.allclose(found["bernoulli, SGD"]["losses"], found[how]["losses"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory):
    """MiniLM for banking77, and 500 of its lines."""
    from pretrained import MINILM, shared_data

    from fleetune import export

    source = shared_data("banking77")
    folder = tmp_path_factory.mktemp("minilm")
    data, labels = folder / "lines.jsonl", folder / "labels.json"
    with gzip.open(source / "train.jsonl.gz", "rt") as lines:
        data.write_text("".join(line for i, line in enumerate(lines) if i % 20 == 0))
    shutil.copy(source / "labels.json", labels)
    names = json.loads(labels.read_text())
    export(MINILM, task="sequence-classification", labels=names, out=folder / "artifact")
    return folder / "artifact", data


@pytest.mark.slow
@pytest.mark.shared_data
def test_fifty_steps_on_banking77(minilm, tmp_path):
    """A policy that draws; within 1e-4 of ``fleetune train``."""
    artifact, data = minilm
    work = {"steps": 50, "batch_size": 16, "seed": 7, "policy": {"name": "bernoulli", "drop": 0.3}}
    losses, _ = reference(artifact, data, work, tmp_path / "run")
    (found,) = train(tmp_path, artifact, [{"data": data, "work": work}])
    assert np.abs(np.subtract(found["losses"], losses)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("name", LORA_WORKS)
def test_parts_of_a_lora(name, minilm, tmp_path):
    artifact, data = minilm
    work, made = STEPS | {"steps": 5} | LORA_WORKS[name], tmp_path / "adapter.safetensors"
    losses, adapter = reference(artifact, data, work, tmp_path / "run")
    (found,) = train(tmp_path, artifact, [{"data": data, "work": work, "adapter": made}])
    assert np.allclose(found["losses"], losses, rtol=0, atol=1e-5)
    assert furthest(load_file(made), adapter) < 1e-4
