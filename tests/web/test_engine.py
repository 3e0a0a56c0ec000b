"""The JavaScript engine on onnxruntime-web: what torch recorded, and what is refused before a weight is read."""

import json
from pathlib import Path

import pytest
from node_web import needs_web, run
from paths import DATA

pytestmark = needs_web
SCRIPT = "selfcheck.mjs"
INT8_LIMIT = 5e-2
"""Of ``fleetune selfcheck``."""


def test_the_golden_step_of_the_tiny_artifact(word_artifact):
    """Every plan, saved and recomputed: loss, logits and every gradient."""
    found = run(SCRIPT, word_artifact, "all")
    assert found["ok"]
    assert found["worst"] < 1e-5
    assert found["count"] == 40
    assert any(".recompute." in name for name in found["tensors"])


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["fp32", "fp16", "int8", "int4"])
def test_the_golden_step_of_minilm(base_dtype, tmp_path):
    from pretrained import MINILM

    from fleetune import export

    out = tmp_path / "artifact"
    export(MINILM, task="sequence-classification", num_labels=4, base_dtype=base_dtype, out=out)
    found = run(SCRIPT, out)
    assert found["worst"] < 1e-4
    assert found["count"] == (96 if base_dtype == "int8" else 88)


@pytest.mark.parametrize(("name", "count"), [("chat_artifact", 32), ("tiny_writer", 48)])
def test_the_golden_step_of_tiny_decoders(name, count):
    """A head that works token by token, saved and recomputed, of the committed artifacts."""
    found = run(SCRIPT, DATA / name, "all")
    assert found["worst"] < 1e-4
    assert found["count"] == count == 2 * sum(".recompute." in label for label in found["tensors"])


def test_nothing_stays_in_the_memory_of_webassembly_after_a_pass(word_artifact):
    """Of every way through the layers, and of one that fails; and weights are not copied there again."""
    found = run("leases.mjs", word_artifact)
    alive, weights = found["alive"], (word_artifact / "base.safetensors").stat().st_size
    assert 0 < found["copied"] < weights / 4, "its functions are the ones that the engine knows"
    assert alive.pop("an id without a row").startswith("0 DataError")
    assert set(alive.values()) == {0}, alive


TINY = [
    ("llama", "causal-lm"),
    ("llama", "sequence-classification"),
    ("gpt2", "causal-lm"),
    ("vit", "image-classification"),
]


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(("name", "task"), TINY)
def test_the_golden_step_of_tiny_decoders_and_pictures(name, task, base_dtype, tmp_path):
    """A head that works token by token, grouped heads, tied tables and patches; saved and recomputed."""
    from architectures import export_tiny

    found = run(SCRIPT, export_tiny(name, task, tmp_path, base_dtype=base_dtype), "all")
    assert found["worst"] < (1e-5 if base_dtype != "int8" else INT8_LIMIT)
    recomputed = {label.replace(".recompute.", ".") for label in found["tensors"] if ".recompute." in label}
    assert recomputed == {label for label in found["tensors"] if ".recompute." not in label}
    assert any(".grad." in label for label in recomputed)


def _spoilt(name):
    def spoil(folder: Path) -> None:
        path = folder / name
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    return spoil


def _cut(folder: Path) -> None:
    path = folder / "base.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _changed(**fields):
    def change(folder: Path) -> None:
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def _leading_outside(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../elsewhere"] = {"sha256": "0" * 64, "size_bytes": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _beyond_its_file(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"][0]["offset"] = 10**9
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_spoilt("base.safetensors"), "base.safetensors: SHA-256 differs"),
        (_spoilt("graphs/head.train.onnx"), "graphs/head.train.onnx: SHA-256 differs"),
        (_cut, "truncated"),
        (_changed(format=99), "format 99 is newer than 2"),
        (_changed(format=1), "format 1 is older"),
        (_changed(backend="executorch"), "a page runs artifacts of backend"),
        (_changed(layers=[{"kind": 7, "tensors": []}]), "kind 7 of 1"),
        (_leading_outside, "leads outside the folder"),
        (_beyond_its_file, "ends beyond base.safetensors"),
        (lambda folder: (folder / "manifest.json").unlink(), "no artifact here"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not a manifest"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    ],
)
def test_a_bad_artifact_is_one_sentence(spoil, said, word_artifact, spoilt_artifacts):
    folder = spoilt_artifacts(word_artifact, spoil)
    found = run("refusal.mjs", folder)
    assert found["name"] == "ArtifactError"
    assert said in found["message"]
    assert "\n" not in found["message"]
