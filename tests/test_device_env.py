"""An environment with ``fleetune[device]`` only, as ``make device-env`` makes it: no torch, and a device lives in it."""

import json
import subprocess

import children
import pytest
from paths import ROOT
from pretrained import minilm_artifact

BIN = ROOT / ".venv-device" / "bin"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIN.is_dir(), reason="no .venv-device; make it with `make device-env`"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"thing number {i}", "label": i % 2}) + "\n" for i in range(96))
    )
    return path


def there(*words, **options):
    """Run a program of that environment, away from this checkout."""
    command = [str(BIN / words[0]), *map(str, words[1:])]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False, **options)


@pytest.mark.parametrize("module", ["torch", "transformers", "peft", "onnx", "amqtt"])
def test_it_has_no_training_framework(module):
    assert "ModuleNotFoundError" in there("python", "-c", f"import {module}").stderr


def test_export_says_what_to_install(tmp_path):
    failed = there("fleetune", "export", "model", "--task", "causal-lm", "--out", tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.endswith("run: pip install 'fleetune[export]'\n")


def test_it_trains(data, tmp_path):
    done = there(
        "fleetune", "train", minilm_artifact(2), "--data", data, "--steps", 2, "--out", tmp_path, "--json"
    )
    assert json.loads(done.stdout)["steps"] == 2, done.stderr


def test_a_device_takes_part_in_a_round(data, tmp_path, mosquitto):
    from flat import aggregate

    artifact, job = minilm_artifact(2), {"mqtt": mosquitto.url, "job": "home"}
    words = [
        str(BIN / "fleetune"),
        "device",
        str(artifact),
        "--data",
        str(data),
        "--state",
        str(tmp_path / "state"),
    ]
    words += ["--mqtt", job["mqtt"], "--job", job["job"], "--json"]
    with children.start(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as device:
        try:
            report = aggregate(artifact, **job, rounds=1, clients=1, local_steps=2, out=tmp_path / "run")
            out, err = device.communicate(timeout=60)
        finally:
            device.kill()
    assert report.rounds == 1
    assert json.loads(out)["rounds"] == 1, err
