"""A folder appears whole or not at all, and its manifest lists every file that lies in it."""

import dataclasses
import hashlib
from pathlib import Path

import msgspec
import pytest

from fleetune.device_runtime.contracts.artifact import MANIFEST
from fleetune.device_runtime.contracts.manifest import Kind, Manifest, Section, Tokenizer
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.assembly import Description, Structure, assemble, new_folder
from fleetune.exporters.model.program import Program

STRUCTURE = Structure((), Section({}), (Kind({}),), (), Section({}), (), 16)
DESCRIPTION = Description("name", "Arch", "task", ("a", "b"), {"r": 4}, licences={"model": "mit"})


def test_a_folder_takes_its_place_when_all_went_well(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "artifact"
    with new_folder(out) as folder:
        (folder / MANIFEST).write_text("first")
        assert not out.exists()
    with new_folder(out) as folder:
        (folder / "other").write_text("second")
    assert [path.name for path in out.iterdir()] == ["other"]
    assert [path.name for path in out.parent.iterdir()] == ["artifact"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    with new_folder(out) as folder:
        (folder / MANIFEST).write_text("old")
    with pytest.raises(KeyError), new_folder(out):
        raise KeyError
    assert (out / MANIFEST).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_no_artifact_is_not_replaced(what: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out if what == "file" else out / "precious").parent.mkdir(exist_ok=True)
    (out if what == "file" else out / "precious").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an artifact"), new_folder(out):
        pass
    assert out.is_file() or [path.name for path in out.iterdir()] == ["precious"]


def test_the_manifest_lists_every_file_and_is_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "a.onnx").write_bytes(b"graph")
    made = assemble(tmp_path, DESCRIPTION, STRUCTURE, backend="onnx", base_dtype="fp16", bounds={"seq": 9})
    assert {name: (f.sha256, f.size_bytes) for name, f in made.files.items()} == {
        "graphs/a.onnx": (hashlib.sha256(b"graph").hexdigest(), 5)
    }
    assert (made.backend, made.base_dtype, made.bounds, made.hidden_size) == ("onnx", "fp16", {"seq": 9}, 16)
    assert (made.labels, made.peft, made.licences) == (("a", "b"), {"r": 4}, {"model": "mit"})
    assert made.tokenizer is None
    assert {"fleetune", "torch", "onnx"} == made.versions.keys()
    assert msgspec.json.decode((tmp_path / MANIFEST).read_bytes(), type=Manifest) == made


def test_a_tokenizer_lies_beside_and_has_a_digest(tmp_path: Path) -> None:
    described = Description("name", "Arch", "task", (), {}, tokenizer=b"{}", pad_id=3, max_length=7)
    made = assemble(tmp_path, described, STRUCTURE, backend="onnx")
    assert made.tokenizer == Tokenizer("tokenizer.json", 3, 7)
    assert made.files["tokenizer.json"].size_bytes == 2
    assert (tmp_path / "tokenizer.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("bounds", "positions", "seq"),
    [({}, 12, 12), ({"seq": 9}, 12, 9), ({"seq": 99}, 12, 12), ({"seq": 9}, None, 9)],
)
def test_the_smaller_of_the_backends_and_the_models_lengths_holds(
    bounds: dict[str, int], positions: int | None, seq: int, tmp_path: Path
) -> None:
    description = dataclasses.replace(DESCRIPTION, positions=positions)
    assert assemble(tmp_path, description, STRUCTURE, backend="onnx", bounds=bounds).bounds == {"seq": seq}


def test_the_side_that_a_tokenizer_cuts_is_kept(tmp_path: Path) -> None:
    description = dataclasses.replace(
        DESCRIPTION, tokenizer=b"{}", pad_id=7, max_length=5, truncation_side="left"
    )
    made = assemble(tmp_path, description, STRUCTURE, backend="onnx")
    assert made.tokenizer == Tokenizer("tokenizer.json", 7, 5, "left")


def test_every_file_may_be_read_by_whom_the_umask_lets(
    classifier: tuple[Path, Program], tmp_path: Path
) -> None:
    """A service of another user reads what was copied; safetensors makes files for their owner alone."""
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in classifier[0].rglob("*") if path.is_file()}
    assert {name for name, mode in modes.items() if mode != usual} == set()
    assert {"adapter.safetensors", "golden.safetensors"} <= modes.keys()
