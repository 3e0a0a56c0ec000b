"""Language models whose embeddings, head and blocks are packed: against torch with the values that the packing keeps."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers
from architectures import CAUSAL, errors_at_sizes, export_folder, save_tiny, torch_program

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import BASE, open_artifact
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.exporters.model.program import tensors_of
from fleetune.exporters.model.quantize import GROUP, derive, rounded, split_form
from fleetune.exporters.onnx.passes import packed

PIECES = {"vocab_size": 384, "tie_word_embeddings": True, "num_hidden_layers": 2}
"""Of a vocabulary that takes three pieces of 16 kB."""


def given_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "UNPACKED_BYTES", 1 << 14)


def dequantised(artifact: Path, model: Path):
    """The program in torch, with what the artifact keeps of its weights; for use in a ``with``."""
    program = torch_program(model, CAUSAL)
    tensors, names = tensors_of(program.module), {new: old for old, new in program.names.items()}
    rows = [split_form(row.name) for row in open_artifact(artifact).manifest.tensors if not row.trainable]
    slots = [f"{names.get(name, name)}:{form}" for name, form in rows if form]
    assert slots
    return program, rounded(tensors, slots)


def copied_whole(artifact: Path, section: str, folder: Path) -> list[str]:
    """Packed inputs that onnxruntime splits, or keeps a piece of from one product to another, in any graph of a section."""
    found = []
    for path in sorted((artifact / "graphs").glob(f"{section}.*.onnx")):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(folder / path.name)
        options.log_severity_level = 4
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = list(onnx.load(folder / path.name).graph.node)
        for node in nodes:
            if node.op_type in ("Split", "Slice") and node.input[0].endswith(("_packed", "_steps")):
                readers = [n for n in nodes if set(node.output) & set(n.input)]
                found += [f"{path.name}: {node.input[0]}"] * (node.op_type == "Split" or len(readers) > 2)
        assert any(node.op_type == "Slice" and node.input[0].endswith("_packed") for node in nodes)
    return found


@pytest.mark.parametrize("name", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_four_bits_train_as_torch_does_with_the_same_values(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_pieces(monkeypatch)
    model = save_tiny(name, CAUSAL, tmp_path / "model", **(PIECES if name == "llama" else {}))
    artifact = export_folder(model, CAUSAL, tmp_path / "artifact", base_dtype="int4")
    report = selfcheck(artifact)
    assert report.ok
    assert report.limit == 1e-4
    assert report.max_relative_error < 1e-5
    if name == "llama":  # the other's head is small enough to be one piece
        assert copied_whole(artifact, "head", tmp_path) == []
    program, kept = dequantised(artifact, model)
    with kept:
        errors = errors_at_sizes(artifact, program)
    assert max(errors.values()) < 1e-4, errors
    assert [n for n in report.tensors if ".after " in n]
    forms = {split_form(row.name) for row in open_artifact(artifact).manifest.tensors if len(row.shape) > 1}
    assert {form for _, form in forms if form} == {"int4", "int4scale"}
    table = [name for name, form in forms if form == "int4" and "layers" not in name]
    assert len(table) == (1 if name == "llama" else 2)  # tied, it is there once


@pytest.mark.slow
def test_the_artifact_is_less_than_a_quarter(tmp_path: Path) -> None:
    model = save_tiny("llama", CAUSAL, tmp_path / "model", vocab_size=8192, tie_word_embeddings=True)
    sizes = {
        kept: (export_folder(model, CAUSAL, tmp_path / kept, base_dtype=kept) / BASE).stat().st_size
        for kept in ("fp32", "int8", "int4")
    }
    assert sizes["int4"] < 0.2 * sizes["fp32"]
    assert sizes["int8"] < 0.32 * sizes["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_int8_keeps_the_head_near(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_pieces(monkeypatch)
    changes = {"tie_word_embeddings": tied, "vocab_size": 384}
    model = save_tiny("llama", CAUSAL, tmp_path / "model", **changes)
    artifact = export_folder(model, CAUSAL, tmp_path / "artifact", base_dtype="int8")
    report = selfcheck(artifact)
    assert report.ok
    assert report.max_relative_error < 1e-3
    outside = [split_form(row.name) for row in open_artifact(artifact).manifest.tensors if row.layer < 0]
    assert {form for name, form in outside if name.endswith(("embed_tokens.weight", "lm_head.weight"))} == {
        "rows",
        "rowscale",
    }


@pytest.mark.slow
def test_an_unlabelled_batch_is_answered_as_torch_answers(tmp_path: Path) -> None:
    model = save_tiny("llama", CAUSAL, tmp_path / "model")
    artifact = open_artifact(export_folder(model, CAUSAL, tmp_path / "artifact", base_dtype="int4"))
    ids = np.random.default_rng(0).integers(4, 128, (2, 7))
    program, kept = dequantised(artifact.folder, model)
    with kept, torch.no_grad():
        plain: transformers.PreTrainedModel = program.module
        expected = plain(torch.from_numpy(ids)).logits.numpy()
    with open_engine(artifact) as engine:
        found = engine.predict({"input_ids": ids, "attention_mask": np.ones_like(ids)}, artifact.adapter())
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_four_bits_by_hand() -> None:
    steps = torch.arange(GROUP) % 16 - 8
    exact = torch.stack([0.5 * steps, -0.25 * steps])  # the second has its furthest value above zero
    values, scale = derive("w", exact, "int4"), derive("w", exact, "int4scale")
    assert scale.flatten().tolist() == [0.5, -0.25]
    assert values.shape == (2, 1, GROUP // 2)
    assert values[0, 0, :3].tolist() == [0x00, 0x11, 0x22]  # weights 0 and 16, 1 and 17, 2 and 18
    weight = exact.clone()
    with rounded({"w": weight}, ["w:int4", "w:int4scale"]):
        assert torch.equal(weight, exact)


def test_no_weight_is_further_than_a_step() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(5, 3 * GROUP) * torch.logspace(-6, 3, 5)[:, None]
    matrix[2, :GROUP] = 0
    kept = matrix.clone()
    with rounded({"w": kept}, ["w:int4"]):
        off = (kept - matrix).unflatten(1, (-1, GROUP)).abs()
        assert (off <= 1.0001 * derive("w", matrix, "int4scale").abs()).all()
        assert float(((kept - matrix).norm(dim=1) / matrix.norm(dim=1)).max()) < 0.12
        assert not kept[2, :GROUP].any()
    assert torch.equal(kept, matrix)


def test_large_tables_are_rounded_in_parts_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(7, 2 * GROUP)
    whole = {form: derive("w", matrix, form) for form in ("rows", "rowscale", "int4", "int4scale")}
    monkeypatch.setattr("fleetune.exporters.model.quantize._AT_ONCE", 2 * matrix.shape[1])
    assert all(torch.equal(derive("w", matrix, form), kept) for form, kept in whole.items())
