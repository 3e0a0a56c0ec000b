"""Graphs made here open in the oldest onnxruntime that is promised, and compute the same there."""

import json
import subprocess
from pathlib import Path

import pytest
from architectures import CAUSAL, IMAGE, SEQUENCE, export_tiny
from paths import ROOT

BIN = ROOT / ".venv-oldest" / "bin"
CASES = [
    ("bert", SEQUENCE),
    ("deberta-v2", SEQUENCE),
    ("modernbert", SEQUENCE),
    ("llama", CAUSAL),
    ("gemma3", CAUSAL),
    ("gpt2", CAUSAL),
    ("mixtral", CAUSAL),
    ("vit", IMAGE),
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIN.is_dir(), reason="no .venv-oldest; make it with `make oldest-env`"),
]


def oldest_selfcheck(artifact: Path) -> dict:
    """Run it in that environment, away from this checkout."""
    command = [str(BIN / "fleetune"), "selfcheck", str(artifact), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_is_the_promised_one() -> None:
    asked = [str(BIN / "python"), "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip() == "1.20.0"


@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_architecture_replays_its_golden_step(name: str, task: str, tmp_path: Path) -> None:
    assert oldest_selfcheck(export_tiny(name, task, tmp_path))["ok"]


@pytest.mark.parametrize("base_dtype", ["fp16", "int8", "int4"])
def test_so_do_smaller_weights(base_dtype: str, tmp_path: Path) -> None:
    assert oldest_selfcheck(export_tiny("bert", SEQUENCE, tmp_path, base_dtype=base_dtype))["ok"]
