"""The real aarch64 wheels, in an emulator: what a Raspberry Pi runs, against this machine. No board has run any of it."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import plain_models
import pytest
import torch
from pretrained import MINILM, minilm_artifact

from broker.aggregation import aggregate
from device_runtime.adapters import load_peft
from device_runtime.arrays import Array, Arrays
from device_runtime.artifact import open_artifact
from device_runtime.training import train

ARM = Path(__file__).parent.parent / ".venv-arm"
PACKAGES = ("device_runtime", "broker", "exporters", "toolkit")
CPUS = {"cortex-a72": "Raspberry Pi 4", "cortex-a76": "Raspberry Pi 5"}
"""The second has dot products of int8, the first has not: onnxruntime takes other kernels."""
LIMIT = 1e-4
WORK = {"batch_size": 2, "seq_len": 8, "threads": 1}


def _is_current() -> bool:
    """Whether the environment was made from these sources."""
    stamp = ARM / "arm.stamp"
    sources = [path for package in PACKAGES for path in (ARM.parent / package).rglob("*.py")]
    return stamp.is_file() and stamp.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not _is_current(),
        reason="no .venv-arm of these sources; `make arm-env` makes it, or says why it cannot",
    ),
]


def start(*words: object, cpu: str = "cortex-a76") -> subprocess.Popen:
    """Start Python for aarch64 with the aarch64 wheels, away from this checkout."""
    emulator = [ARM / "qemu-aarch64-static", "-cpu", cpu, "-L", ARM / "system"]
    command = [str(word) for word in (*emulator, ARM / "system/usr/bin/python3.11", *words)]
    environment = {**os.environ, "PYTHONPATH": str(ARM / "packages")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile everything again takes longer than the work
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd="/", env=environment, **pipes)


def finished(process: subprocess.Popen, *, timeout_s: float = 600) -> str:
    try:
        out, err = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def start_fleetune(*words: object, **options: object) -> subprocess.Popen:
    return start(ARM / "packages/bin/fleetune", *words, "--threads", 1, "--json", **options)


def fleetune(*words: object, **options: object) -> dict:
    return json.loads(finished(start_fleetune(*words, **options)).splitlines()[-1])


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "artifact"
    plain_models.export(plain_models.Classifier((0.2, 0.3)), folder)
    return folder


@pytest.fixture(scope="module")
def minilm() -> Path:
    return minilm_artifact(2)


@pytest.fixture(scope="module")
def minilm_int8(tmp_path_factory) -> Path:
    from toolkit.export import export

    folder = tmp_path_factory.mktemp("int8") / "artifact"
    export(MINILM, task="sequence-classification", num_labels=2, base_dtype="int8", out=folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"thing number {i}", "label": i % 2}) + "\n" for i in range(16))
    )
    return path


def assert_same_adapter(found: str, expected: str, artifact: Path, *, is_exact: bool = True) -> None:
    """Within the limit each value, or only all together; and far from where both began."""
    opened = open_artifact(artifact)
    first, manifest = opened.adapter(), opened.manifest
    there, here, start = (
        _joined(a) for a in (*(load_peft(Path(f), manifest) for f in (found, expected)), first)
    )
    largest, norm = np.abs(there - here).max(), np.linalg.norm(there - here) / np.linalg.norm(here)
    print(f"adapter: largest difference {largest:.1e}, norm {norm:.1e}")
    assert (largest if is_exact else norm) <= LIMIT
    assert np.abs(here - start).max() >= 10 * LIMIT


def _joined(adapter: Arrays) -> Array:
    return np.concatenate([adapter[name].ravel() for name in sorted(adapter)])


def test_it_is_an_arm_machine_with_the_wheels_of_one():
    code = "import onnxruntime, platform; print(platform.machine(), onnxruntime.__file__)"
    machine, _, file = finished(start("-c", code)).strip().partition(" ")
    assert machine == "aarch64"
    assert Path(file).is_relative_to(ARM)


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("artifact", ["plain", "minilm", "minilm_int8"])
def test_the_golden_step(artifact, cpu, request):
    report = fleetune("selfcheck", request.getfixturevalue(artifact), cpu=cpu)
    print(f"{artifact} on {cpu}: {report['max_relative_error']:.1e}")
    assert report["ok"]


def test_a_provider_that_the_wheel_lacks_is_refused(minilm, data, tmp_path):
    process = start_fleetune("train", minilm, "--data", data, "--provider", "xnnpack", "--out", tmp_path)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert re.fullmatch(
        r"fleetune: provider xnnpack: this build of onnxruntime \S+ has no \w+; have: cpu\n", err
    )


# AdamW divides a gradient by its own size, and makes a step of what is only noise; SGD does not.
@pytest.mark.parametrize(("optimizer", "lr"), [("adamw", 2e-3), ("sgd", 0.1)])
def test_it_trains_as_here(optimizer, lr, minilm, data, tmp_path):
    words = ["--optimizer", optimizer, "--lr", lr, "--steps", 4, "--batch-size", 2, "--seq-len", 8]
    there = fleetune("train", minilm, "--data", data, *words, "--out", tmp_path / "there")
    here = train(minilm, data=data, optimizer=optimizer, lr=lr, steps=4, **WORK, out=tmp_path / "here")
    print(
        f"losses: largest difference {max(abs(a - b) for a, b in zip(there['losses'], here.losses, strict=True)):.1e}"
    )
    assert there["losses"] == pytest.approx(here.losses, abs=LIMIT)
    assert_same_adapter(there["adapter"], here.adapter, minilm, is_exact=optimizer == "sgd")


def test_a_device_takes_part_in_a_round(minilm, data, tmp_path, mosquitto):
    job, optimizer = {"mqtt": mosquitto.url, "job": "home"}, {"optimizer": "sgd", "lr": 0.1}
    words = ["--mqtt", job["mqtt"], "--job", job["job"], "--data", data, "--state", tmp_path / "state"]
    device = start_fleetune("device", minilm, *words, "--timeout-s", 120)
    try:
        work = {"batch_size": 2, "seq_len": 8, "local_steps": 3, **optimizer}
        run = aggregate(minilm, **job, **work, rounds=1, clients=1, gather_s=300, out=tmp_path / "run")
        report = json.loads(finished(device).splitlines()[-1])
    finally:
        device.kill()
    here = train(minilm, data=data, steps=3, **optimizer, **WORK, out=tmp_path / "here")
    assert (report["rounds"], report["steps"], report["refused"]) == (1, 3, 0)
    assert_same_adapter(run.adapter, here.adapter, minilm)
