"""What PEFT can make of LoRA, exported: fused projections, rsLoRA, patterns, whole modules, DoRA, an adapter to go on from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from architectures import LABEL_NAMES, SEQUENCE, errors_at_sizes, export_folder, save_tiny, torch_program
from safetensors.torch import load_file

from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.toolkit.lora import attach_lora
from fleetune.toolkit.merge import merge
from fleetune.toolkit.models import load_model

pytestmark = pytest.mark.slow
IDS = torch.arange(5, 20)[None]


def a_used_adapter(model: Path, folder: Path, **settings: Any) -> Path:
    """An adapter of which no tensor is zero, as PEFT saves it."""
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    config = peft.LoraConfig(task_type="SEQ_CLS", lora_dropout=0.1, **settings)
    learning = peft.get_peft_model(plain, config)
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 if parameter.requires_grad else 0)
    learning.save_pretrained(folder)
    return folder


def assert_exact(artifact_dir: Path, model: Path, **settings: Any) -> Artifact:
    errors = errors_at_sizes(artifact_dir, torch_program(model, SEQUENCE, **settings))
    assert max(errors.values()) < 1e-4, errors
    return open_artifact(artifact_dir)


def test_an_adapter_on_a_fused_projection_with_patterns_goes_on_and_comes_back(tmp_path: Path) -> None:
    model = save_tiny("gpt2", SEQUENCE, tmp_path / "model")
    given = a_used_adapter(
        model,
        tmp_path / "given",
        r=4,
        lora_alpha=6,
        target_modules=["c_attn", "mlp.c_proj"],
        fan_in_fan_out=True,
        use_rslora=True,
        rank_pattern={"h.1.attn.c_attn": 2},
        alpha_pattern={"h.2.attn.c_attn": 3},
        modules_to_save=["score"],
    )
    out = export_folder(model, SEQUENCE, tmp_path / "artifact", adapter=given)
    artifact = assert_exact(out, model, adapter=given)
    assert [layer.kind for layer in artifact.manifest.layers] == [0, 1, 2, 0]
    start, saved = artifact.adapter(), load_file(given / "adapter_model.safetensors")
    assert start.keys() == saved.keys()
    assert all(torch.equal(torch.from_numpy(start[n]), saved[n]) for n in saved)
    save_peft(tmp_path / "run" / "adapter", artifact.manifest, start)
    back = merge(tmp_path / "run", out=tmp_path / "back")
    assert json.loads((back / "adapter_config.json").read_text())["rank_pattern"] == {"h.1.attn.c_attn": 2}
    assert logits_with(model, back).equal(logits_with(model, given))


def test_dora_on_a_fused_projection_equals_torch(tmp_path: Path) -> None:
    model = save_tiny("modernbert", SEQUENCE, tmp_path / "model")
    settings = {"target_modules": ["Wqkv"], "use_dora": True, "use_rslora": True}
    out = export_folder(model, SEQUENCE, tmp_path / "artifact", **settings)
    artifact = assert_exact(out, model, **settings)
    assert [n for n in artifact.adapter() if n.endswith("layers.2.attn.Wqkv.lora_magnitude_vector")]
    trained = {n: a + np.float32(0.05) for n, a in artifact.adapter().items()}
    save_peft(tmp_path / "run" / "adapter", artifact.manifest, trained)
    expected = logits_with(model, tmp_path / "run" / "adapter")
    assert not expected.allclose(logits_of(model), atol=1e-3)
    assert logits_with(model, merge(tmp_path / "run", out=tmp_path / "back")).equal(expected)
    merged = merge(tmp_path / "run", out=tmp_path / "merged", full=True, model=model)
    torch.testing.assert_close(logits_of(merged), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits_of(merged), merged_by_hand(model, trained), atol=1e-5, rtol=1e-5)


def merged_by_hand(model: Path, adapter: dict[str, np.ndarray]) -> torch.Tensor:
    """DoRA (arXiv 2402.09353): W' = m (W + s BA) / |W + s BA| by rows; s = alpha / sqrt(r), as rsLoRA has it."""
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    tensors = {n.removeprefix("base_model.model."): torch.from_numpy(a) for n, a in adapter.items()}
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = name.removesuffix(".weight")
            if name in tensors:
                parameter.copy_(tensors[name])
            elif f"{module}.lora_A.weight" in tensors:
                b, a = tensors[f"{module}.lora_B.weight"], tensors[f"{module}.lora_A.weight"]
                moved = parameter + 16 / 8**0.5 * b @ a
                magnitude = tensors[f"{module}.lora_magnitude_vector"][:, None]
                parameter.copy_(magnitude * moved / moved.norm(dim=1, keepdim=True))
        return plain.eval()(IDS).logits


def test_rslora_scales_by_the_root_of_the_rank(tmp_path: Path) -> None:
    model = save_tiny("bert", SEQUENCE, tmp_path / "model")
    plain, _ = load_model(str(model), task=SEQUENCE, labels=LABEL_NAMES)
    learning = attach_lora(plain, task=SEQUENCE, r=4, alpha=6, target_modules=["query"], use_rslora=True)
    layer = next(m for m in learning.modules() if isinstance(m, peft.tuners.lora.Linear))
    assert layer.scaling["default"] == 3.0


def logits_with(model: Path, adapter: Path) -> torch.Tensor:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(plain, adapter).eval()(IDS).logits


def logits_of(model: Path) -> torch.Tensor:
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    with torch.no_grad():
        return plain.eval()(IDS).logits
