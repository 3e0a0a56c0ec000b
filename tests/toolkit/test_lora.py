"""LoRA on a loaded model: where it goes by itself, what is refused, and an adapter that comes in whole or not at all."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.lora import adapter_names, attach_lora, load_adapter

SEQUENCE, IMAGE = "sequence-classification", "image-classification"
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def targets_of(model: Any) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_fresh_lora_goes_where_peft_knows_it_to_be_good() -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=None)
    self_attention = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert targets_of(learning) == {f"{at}.{name}" for at in self_attention for name in ("query", "value")}
    assert learning.peft_config["default"].lora_dropout == 0.0


def test_of_an_architecture_that_peft_does_not_know_every_linear_in_the_blocks_is_taken() -> None:
    model = bert()
    model.config.model_type = "nobody-knows"
    found = targets_of(attach_lora(model, task=SEQUENCE, r=2, alpha=4, target_modules=None))
    assert len(found) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in found)


def test_an_image_head_learns_though_peft_has_no_such_task() -> None:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=2, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    learning = attach_lora(model, task=IMAGE, r=2, alpha=4, target_modules=None)
    assert "base_model.model.classifier.weight" in adapter_names(learning).values()


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(
        ExportError, match=r"'q_proj': not in this model; its linear modules are .*key, query, value"
    ):
        attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query", "q_proj"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_names_are_those_of_the_saved_file(use_dora: bool, tmp_path: Path) -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"], use_dora=use_dora)
    learning.save_pretrained(tmp_path)
    names, saved = adapter_names(learning), load_file(tmp_path / WEIGHTS)
    assert set(names.values()) == saved.keys()
    for own, name in names.items():
        assert torch.equal(learning.get_parameter(own), saved[name])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of a BERT, every tensor of it non-zero."""
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"])
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.requires_grad else 0)
    learning.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_comes_in_and_goes_on_learning(saved: Path) -> None:
    learning, content = load_adapter(bert(), str(saved)), load_file(saved / WEIGHTS)
    for own, name in adapter_names(learning).items():
        assert torch.equal(learning.get_parameter(own), content[name])
        assert learning.get_parameter(own).requires_grad


def test_a_tensor_that_is_missing_is_named_and_not_drawn_anew(saved: Path) -> None:
    content = load_file(saved / WEIGHTS)
    gone = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"
    del content[gone]
    save_file(content, saved / WEIGHTS)
    with pytest.raises(ExportError, match=rf"not a PEFT adapter for this model: 1 missing, {gone}"):
        load_adapter(bert(), str(saved))


def test_an_adapter_for_more_layers_is_refused(saved: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=12, num_labels=3, **{**SIZES, "num_hidden_layers": 1}
    )
    with pytest.raises(ExportError, match=r"not a PEFT adapter for this model: .*layer\.1\."):
        load_adapter(transformers.BertForSequenceClassification(config), str(saved))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["query"]}))
    with pytest.raises(ExportError, match="not a PEFT adapter for this model"):
        load_adapter(bert(), str(tmp_path))
