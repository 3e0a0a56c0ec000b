"""``merge --onnx`` of the tasks beside classification of whole samples; those are in test_problem_types."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from architectures import export_tiny

from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.toolkit.merge import merge
from fleetune.toolkit.remembering import stepping_of


def test_a_model_without_an_adapter_runs_on_new_tokens_too() -> None:
    tiny = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**tiny, num_hidden_layers=1, num_key_value_heads=2)
    assert stepping_of(transformers.LlamaForCausalLM(config), ["input_ids", "attention_mask"])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "task"), [("llama", "causal-lm"), ("bert", "token-classification")])
def test_each_token_has_the_merged_models_logits(name: str, task: str, tmp_path: Path) -> None:
    artifact = open_artifact(export_tiny(name, task, tmp_path), verify=False)
    generator = np.random.default_rng(0)
    adapter = {
        n: (v + generator.normal(0, 0.02, v.shape)).astype(np.float32) for n, v in artifact.adapter().items()
    }
    save_peft(tmp_path / "run" / "adapter", artifact.manifest, adapter)
    given = {"model": tmp_path / "model", "artifact": artifact.folder, "task": task}
    out = merge(tmp_path / "run", onnx=True, out=tmp_path / "onnx", **given)
    full = merge(tmp_path / "run", full=True, out=tmp_path / "full", **given)
    kind = (
        transformers.AutoModelForCausalLM
        if task == "causal-lm"
        else transformers.AutoModelForTokenClassification
    )
    model = kind.from_pretrained(full, dtype=torch.float32).eval()
    ids = torch.arange(3, 25).reshape(2, 11)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    session = onnxruntime.InferenceSession(out / "model.onnx")
    names = {row.name for row in session.get_inputs()}
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    (logits,) = session.run(["logits"], {n: v.numpy() for n, v in batch.items() if n in names})
    with torch.no_grad():
        wanted = model(**{n: v for n, v in batch.items() if n in names}).logits.numpy()
    kept = mask.numpy().astype(bool)
    np.testing.assert_allclose(logits[kept], wanted[kept], atol=1e-4)
