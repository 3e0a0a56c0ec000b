"""``selfcheck`` on a real artifact: what it reports, and what it does not let pass."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paths import DATA
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from fleetune.device_runtime.arrays import load_arrays, sha256_of
from fleetune.device_runtime.commands import selfcheck as command
from fleetune.device_runtime.commands.selfcheck import LIMIT, relative_distance, relative_error, selfcheck
from fleetune.device_runtime.contracts.artifact import GOLDEN, MANIFEST
from fleetune.device_runtime.engine.stack import Stack
from fleetune.device_runtime.errors import ArtifactError, UnknownName
from fleetune.toolkit.cli import app


@pytest.fixture
def copy(word_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(word_artifact, tmp_path / "artifact"))


def rewrite_golden(folder: Path, *, stretched: str = "", plans: str | None = None) -> None:
    """Record a tensor a thousandth too large, or other plans (empty: none), and have the manifest agree."""
    path = folder / GOLDEN
    with safe_open(path, "np") as file:
        metadata = file.metadata() if plans is None else {"plans": plans} if plans else {}
    arrays = load_arrays(path)
    changed = {n: np.multiply(a, np.float32(1.001)) if n == stretched else a for n, a in arrays.items()}
    save_file(changed, path, metadata=metadata)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][GOLDEN] = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_every_recorded_tensor_is_compared_saved_and_recomputed(copy: Path) -> None:
    report = selfcheck(copy)
    assert report.ok
    assert report.limit == LIMIT
    recorded = {n for n in load_arrays(copy / GOLDEN) if not n.startswith(("batch.", "noise."))}
    again = {f"{plan}.recompute.{name}" for plan, _, name in (n.partition(".") for n in recorded)}
    assert report.tensors.keys() == recorded | again


def test_each_part_of_the_work_is_told_before_it_begins(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    opening, stepping = command.open_artifact, Stack.step

    def opened(folder: Path) -> Any:
        happened.append("opened")
        return opening(folder)

    def stepped(*given: Any, **named: Any) -> Any:
        happened.append("step")
        return stepping(*given, **named)

    monkeypatch.setattr(command, "open_artifact", opened)
    monkeypatch.setattr(Stack, "step", stepped)
    selfcheck(copy, on_progress=happened.append)
    told = [
        f"replaying a step of {n} of 4 layers, activations {how}"
        for how in ("kept", "recomputed")
        for n in (4, 2)
    ]
    assert happened == [
        f"verifying the files of {copy}",
        "opened",
        *(event for line in told for event in (line, "step")),
    ]


def test_on_a_terminal_progress_goes_before_the_result() -> None:
    shown = CliRunner().invoke(app, ["selfcheck", str(DATA / "tiny_writer")])
    lines = shown.stdout.splitlines()
    assert lines[0] == f"verifying the files of {DATA / 'tiny_writer'}"
    assert "replaying the recorded batch part by part, as text is generated" in lines
    assert lines[-1].startswith("ok: ")


def test_a_tensor_that_differs_is_found(copy: Path) -> None:
    rewrite_golden(copy, stretched="dropped.logits")
    report = selfcheck(copy)
    assert not report.ok
    wrong = {name for name, error in report.tensors.items() if error > report.limit}
    assert wrong == {"dropped.logits", "dropped.recompute.logits"}


def test_an_artifact_without_a_recorded_step_is_to_be_exported_again(copy: Path) -> None:
    rewrite_golden(copy, plans="")
    with pytest.raises(ArtifactError, match="no recorded step; export again"):
        selfcheck(copy)


@pytest.mark.parametrize("plans", ["{", "[]", '{"full": 3}', "[" * 100_000])
def test_plans_of_another_form_are_told(copy: Path, plans: str) -> None:
    rewrite_golden(copy, plans=plans)
    with pytest.raises(ArtifactError, match=r"its plans cannot be read: .*; export again"):
        selfcheck(copy)


def test_the_processor_is_named_in_the_report_and_on_the_terminal(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "int8_path", lambda: "neon-i8mm")
    shown = CliRunner().invoke(app, ["selfcheck", str(copy)])
    assert "int8 products of this processor: neon-i8mm" in shown.stdout
    told: dict[str, Any] = json.loads(
        CliRunner().invoke(app, ["selfcheck", str(copy), "--json"]).stdout.splitlines()[-1]
    )
    assert told["int8_path"] == "neon-i8mm"
    assert told["ok"]


def test_a_provider_that_is_not_there_is_told(copy: Path) -> None:
    with pytest.raises(UnknownName, match="no provider 'gpu'"):
        selfcheck(copy, provider="gpu")
    assert CliRunner().invoke(app, ["selfcheck", str(copy), "--provider", "cpu"]).exit_code == 0


@pytest.mark.parametrize("measure", [relative_error, relative_distance])
def test_another_shape_or_a_nan_is_infinitely_far(measure: Any) -> None:
    assert measure(np.ones(3), np.ones(2)) == float("inf")
    assert measure(np.array([1.0, np.nan]), np.ones(2)) == float("inf")
    assert measure(np.zeros(2), np.zeros(2)) == 0


def test_errors_by_hand() -> None:
    found, expected = np.array([3.0, 4.5]), np.array([3.0, -4.0])
    assert relative_error(found, expected) == pytest.approx(8.5 / 4)
    assert relative_distance(found, expected) == pytest.approx(8.5 / 5)
    assert relative_error(np.array([0.5]), np.zeros(1)) == 0.5


def test_steps_of_tokens_are_replayed_too(tmp_path):
    """With keys for values, the first part is right, for it has none before it, and the next ones are not."""
    assert selfcheck(DATA / "tiny_writer", threads=1).ok
    out = shutil.copytree(DATA / "tiny_writer", tmp_path / "artifact")
    found = json.loads((out / MANIFEST).read_text())
    for port in found["kinds"][0]["graphs"]["forward_step"]["outputs"]:
        port["index"] = 1 - port.get("index", 0) if port["role"] == "saved" else 0
    (out / MANIFEST).write_text(json.dumps(found))
    report = selfcheck(out, threads=1)
    wrong = {name for name, error in report.tensors.items() if error > report.limit}
    assert wrong == {f"{plan}.after {end} tokens" for plan in ("full", "dropped") for end in (21, 24)}
