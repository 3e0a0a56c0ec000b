"""A reader refuses before it allocates: every way in which an artifact can be wrong gets one clear line."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import BASE, MANIFEST, check_adapter, open_artifact
from fleetune.device_runtime.contracts.manifest import FORMAT, Targets
from fleetune.device_runtime.errors import ArtifactError

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def copy(word_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(word_artifact, tmp_path / "artifact"))


def edit(folder: Path, change: Change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_written_opens(copy: Path) -> None:
    artifact = open_artifact(copy)
    assert artifact.manifest.num_layers == 4
    assert artifact.adapter().keys() == {t.name for t in artifact.manifest.trainable}


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no artifact here.*fleetune export"):
        open_artifact(tmp_path)


def test_a_truncated_file(copy: Path) -> None:
    path = copy / BASE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"base\.safetensors: \d+ bytes, expected \d+ \(truncated\?\)"):
        open_artifact(copy)


def test_a_tampered_file(copy: Path) -> None:
    path = copy / BASE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"base\.safetensors: SHA-256 differs"):
        open_artifact(copy)


def test_a_missing_graph(copy: Path) -> None:
    (copy / "graphs" / "block0.forward.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"graphs/block0\.forward\.onnx is missing"):
        open_artifact(copy)


def test_a_newer_format(copy: Path) -> None:
    edit(copy, lambda m: m.update(format=99, something_new={}))
    with pytest.raises(ArtifactError, match="format 99 is newer than 2"):
        open_artifact(copy)


@pytest.mark.parametrize("base_dtype", ["fp32", "fp16"])
def test_format_1_opens_under_the_digest_that_it_had(copy: Path, base_dtype: str) -> None:
    edit(copy, lambda m: m.update(format=1, base_dtype=base_dtype))
    artifact = open_artifact(copy)
    assert artifact.manifest.format == FORMAT
    assert artifact.manifest.base_dtype == base_dtype
    assert artifact.digest == hashlib.sha256((copy / MANIFEST).read_bytes()).hexdigest()


def test_format_1_with_int8_weights_is_to_be_exported_again(copy: Path) -> None:
    edit(copy, lambda m: m.update(format=1, base_dtype="int8"))
    with pytest.raises(ArtifactError, match=r"export again with --base-dtype int8: .* wrong .* without VNNI"):
        open_artifact(copy)


def test_an_unknown_field_of_format_1_is_named_too(copy: Path) -> None:
    edit(copy, lambda m: m.update(format=1, surprise=1))
    with pytest.raises(ArtifactError, match=r"manifest\.json.*surprise"):
        open_artifact(copy)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "graphs/../../outside", "a\\b"])
def test_a_path_outside_the_folder(copy: Path, name: str) -> None:
    edit(copy, lambda m: m["files"].update({name: {"sha256": "", "size_bytes": 0}}))
    with pytest.raises(ArtifactError, match="leads outside the folder"):
        open_artifact(copy)


def test_a_link_outside_the_folder(copy: Path, tmp_path: Path) -> None:
    inside = copy / "golden.safetensors"
    elsewhere = tmp_path / "elsewhere"
    shutil.move(inside, elsewhere)
    inside.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="link that leads outside"):
        open_artifact(copy)


def test_a_tensor_beyond_the_file(copy: Path) -> None:
    edit(copy, lambda m: m["tensors"][0].update(shape=[1 << 40]))
    with pytest.raises(ArtifactError, match=r"ends beyond base\.safetensors"):
        open_artifact(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["tensors"][0].update(dtype="job"), r"embed\.weight: no dtype 'job'"),
        (lambda m: m["tensors"][0].update(dtype="V9"), r"embed\.weight: no dtype 'V9'"),
        (lambda m: m["tensors"][0].update(dtype="S"), r"embed\.weight: no dtype 'S'"),
        (
            lambda m: m["tensors"][0].update(shape=[0, 2**63]),
            r"embed\.weight: .* ends beyond base\.safetensors",
        ),
        (lambda m: m["tensors"][0].update(shape=[0, 2**40, 2**40]), r"embed\.weight: .* ends beyond"),
        (lambda m: m["inputs"][0].update(dtype="O"), "input input_ids: no dtype 'O'"),
        (lambda m: m["inputs"][0].update(pad=1e300), "input input_ids: pad 1e[+]300"),
        (lambda m: m["inputs"][0].update(below=-1), "input input_ids: pad 0 or limit -1"),
        (
            lambda m: m["kinds"][0]["graphs"]["forward"]["inputs"][0].update(dtype="x"),
            "kind 0.forward: hidden_0: no dtype",
        ),
        (
            lambda m: m["kinds"][0]["graphs"]["forward"]["inputs"][3].update(index=-1),
            "weight_1: index -1 leads nowhere",
        ),
        (lambda m: m["kinds"][0]["graphs"].pop("forward"), "kind 0: no forward graph"),
        (
            lambda m: m["head"]["graphs"]["train"]["inputs"][1].update(index=9),
            "batch_1: index 9 leads nowhere",
        ),
        (lambda m: m["layers"][1].update(tensors=[5]), "layer 1: 1 tensors, its graphs take 6"),
        (lambda m: m["layers"][1].update(sides=[]), "layer 1: 0 sides, its graphs take 1"),
        (lambda m: m["layers"][1].update(sides=[3]), "layer 1: no side 3 comes out of the prelude"),
        (
            lambda m: m["inputs"].__setitem__(slice(None), [r | {"shape": ["seq"]} for r in m["inputs"]]),
            "none has a row",
        ),
    ],
)
def test_what_leads_nowhere_is_refused_before_it_is_read(copy: Path, change: Change, message: str) -> None:
    edit(copy, change)
    with pytest.raises(ArtifactError, match=message):
        open_artifact(copy)


@pytest.mark.parametrize(
    ("name", "message"), [("x" * 300, "File name too long"), ("a\0b", "a file name|missing")]
)
def test_a_name_that_no_file_can_have(copy: Path, name: str, message: str) -> None:
    edit(copy, lambda m: m["files"].update({name: {"sha256": "", "size_bytes": 0}}))
    with pytest.raises(ArtifactError, match=message):
        open_artifact(copy)


def test_a_manifest_that_may_not_be_read_is_not_one_that_is_missing(copy: Path) -> None:
    (copy / MANIFEST).unlink()
    (copy / MANIFEST).mkdir()
    with pytest.raises(ArtifactError, match=r"manifest\.json: Is a directory"):
        open_artifact(copy)


def test_a_file_of_weights_without_a_byte(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][BASE] = {"sha256": hashlib.sha256().hexdigest(), "size_bytes": 0}
        for row in manifest["tensors"]:
            row.update(file="adapter")

    edit(copy, change)
    (copy / BASE).write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"base\.safetensors: cannot be mapped"):
        open_artifact(copy)


def test_a_slot_outside_the_table(copy: Path) -> None:
    edit(copy, lambda m: m["layers"][2].update(tensors=[100000]))
    with pytest.raises(ArtifactError, match="layer 2: a tensor index outside the table"):
        open_artifact(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "one"}', '{"format": 1}', "\x00"])
def test_a_manifest_that_is_none(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        open_artifact(copy)


def test_an_unknown_field_is_named(copy: Path) -> None:
    edit(copy, lambda m: m["layers"][0].update(surprise=1))
    with pytest.raises(ArtifactError, match="surprise"):
        open_artifact(copy)


def test_a_name_of_several_lines_is_shown_on_one(copy: Path) -> None:
    edit(copy, lambda m: m["layers"][0].update({"sur\nprise\x1b[1m": 1}))
    with pytest.raises(ArtifactError, match=r"sur\?prise\?\[1m") as caught:
        open_artifact(copy)
    assert str(caught.value).isprintable()


def without_role(manifest: dict[str, Any]) -> None:
    manifest["format"] = 1
    for row in manifest["inputs"]:
        row.pop("role", None)


def test_an_artifact_of_format_1_knows_its_labels_by_their_name(copy: Path) -> None:
    expected = open_artifact(copy).manifest.inputs
    edit(copy, without_role)
    assert "role" not in (copy / MANIFEST).read_text().partition('"prelude"')[0]
    manifest = open_artifact(copy).manifest
    assert manifest.inputs == expected
    assert manifest.label_name == "labels"


@pytest.mark.parametrize("format", [1, 2])
@pytest.mark.parametrize(
    ("task", "shift"), [("token-classification", 0), ("causal-lm", 1), ("image-classification", 0)]
)
def test_an_artifact_of_before_counts_what_its_task_did(
    copy: Path, task: str, shift: int, format: int
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest.update(task=task, format=format)
        del manifest["head"]["counted"]

    edit(copy, change)
    assert open_artifact(copy).manifest.counted == Targets(shift, ignored=-100)


def test_an_artifact_that_says_what_it_counts_is_believed(copy: Path) -> None:
    edit(copy, lambda m: m["head"].update(counted="rows"))
    assert open_artifact(copy).manifest.counted is None


@pytest.mark.parametrize("roles", [("", ""), ("labels", "labels")])
def test_there_is_one_input_of_labels(copy: Path, roles: tuple[str, str]) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for row, role in zip(manifest["inputs"][-2:], roles, strict=True):
            row["role"] = role

    edit(copy, change)
    with pytest.raises(ArtifactError, match="inputs: expected one whose role is labels"):
        open_artifact(copy)


def test_every_problem_is_listed_at_once(copy: Path) -> None:
    (copy / BASE).write_bytes(b"")
    (copy / "graphs" / "head.train.onnx").unlink()
    with pytest.raises(
        ArtifactError, match=r"base\.safetensors: 0 bytes.*; graphs/head\.train\.onnx is missing"
    ):
        open_artifact(copy)


def test_frozen_weights_are_views_of_the_file_and_the_adapter_is_ones_own(copy: Path) -> None:
    artifact = open_artifact(copy)
    frozen = next(t for t in artifact.manifest.tensors if not t.trainable)
    assert not artifact.base(frozen).flags.writeable
    one, other = artifact.adapter(), artifact.adapter()
    name = next(iter(one))
    one[name] += 1
    assert not np.array_equal(one[name], other[name])


def test_an_adapter_that_does_not_fit_is_refused_with_every_difference(copy: Path) -> None:
    artifact = open_artifact(copy)
    arrays = artifact.adapter()
    arrays["stray"] = arrays.pop("head.bias")
    arrays["head.weight"] = arrays["head.weight"].astype(np.float64)
    with pytest.raises(
        ArtifactError,
        match=r"stray: not in the artifact; head\.bias: missing; head\.weight: expected float32\[",
    ):
        check_adapter(artifact.manifest, arrays)
