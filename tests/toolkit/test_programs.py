"""A PEFT model as the exporters take it: its inputs, its example batches and what the manifest says of its adapter."""

from typing import Any

import pytest
import torch
import transformers
from tiny_tokenizers import word_tokenizer
from tokenizers import models

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.program import traced_sizes
from fleetune.toolkit.lora import attach_lora
from fleetune.toolkit.programs import LoadedModel, describe, draw_batch, program_of
from fleetune.toolkit.tasks import IGNORED, TASKS

SEQUENCE, TOKENS, CAUSAL, IMAGE, SOUND = (
    "sequence-classification",
    "token-classification",
    "causal-lm",
    "image-classification",
    "audio-classification",
)
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
AST = {"max_length": 24, "num_mel_bins": 16, "patch_size": 8, "time_stride": 8, "frequency_stride": 8}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 2}


def config_of(task: str) -> Any:
    if task == IMAGE:
        return transformers.ViTConfig(**BERT, **VIT, num_labels=3)
    if task == SOUND:
        return transformers.ASTConfig(**BERT, **AST, num_labels=3)
    if task == CAUSAL:
        ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
        return transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=12, **ids)
    return transformers.BertConfig(vocab_size=50, max_position_embeddings=12, num_labels=3, **BERT)


def loaded(task: str, **settings: Any) -> LoadedModel:
    torch.manual_seed(0)
    plain = getattr(transformers, TASKS[task].auto_class).from_config(config_of(task))
    targets = ["q_proj", "v_proj"] if task == SOUND else None  # peft has no choice of its own for these
    learning = attach_lora(plain, task=task, r=2, alpha=4, target_modules=targets)
    return describe(learning, None, task=task, source="tiny", **settings)


@pytest.mark.parametrize("task", TASKS)
def test_an_example_batch_goes_through_model_and_loss(task: str) -> None:
    made = program_of(loaded(task), task=task)
    batch = made.make_batch(3, 9)
    assert list(batch) == [row.name for row in made.inputs]
    extents = {"batch": 3, "seq": 9}
    for row in made.inputs:
        assert list(batch[row.name].shape) == [extents[d] if isinstance(d, str) else d for d in row.shape]
        assert str(batch[row.name].dtype) == f"torch.{row.dtype}"
    assert made.loss(made.logits(batch), batch["labels"]).isfinite()
    assert (made.token_loss is not None) == (task == CAUSAL)


@pytest.mark.parametrize("task", [TOKENS, CAUSAL])
def test_all_rows_but_the_first_are_padded_and_padding_has_no_label(task: str) -> None:
    model = loaded(task)
    batch = draw_batch(model, TASKS[task], batch=3, seq=9)
    assert batch["attention_mask"].sum(1).tolist() == [9, 6, 6]
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == model.pad_id).all()
    assert (batch["labels"] == IGNORED).equal(padding)
    assert batch["labels"].max() < (3 if task == TOKENS else 50)


def test_equal_sizes_give_equal_batches_and_others_do_not() -> None:
    model = loaded(SEQUENCE)
    first, again = (draw_batch(model, TASKS[SEQUENCE], batch=3, seq=9) for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)
    other = draw_batch(model, TASKS[SEQUENCE], batch=3, seq=10)
    assert not first["input_ids"].equal(other["input_ids"][:, :9])


def test_what_the_manifest_says() -> None:
    model = loaded(SEQUENCE)
    assert model.architecture == "BertForSequenceClassification"
    assert model.peft_config["base_model_name_or_path"] == "tiny"
    assert model.peft_config["target_modules"] == sorted(model.peft_config["target_modules"])
    assert model.max_length == 12
    assert loaded(SEQUENCE, max_length=5).max_length == 5
    assert loaded(SEQUENCE, max_length=99).max_length == 12


def test_names_are_those_under_which_peft_saves() -> None:
    made = program_of(loaded(SEQUENCE), task=SEQUENCE)
    assert "base_model.model.classifier.weight" in made.names.values()
    assert all("default" not in name for name in made.names.values())
    assert {n for n, p in made.module.named_parameters() if p.requires_grad} == made.names.keys()


def test_numbers_of_the_configuration_are_no_traced_sizes() -> None:
    assert {8, 50, 12} <= program_of(loaded(SEQUENCE), task=SEQUENCE).shapes


@pytest.mark.parametrize(
    ("task", "below"),
    [
        (SEQUENCE, {"input_ids": 50, "attention_mask": 0, "labels": 0}),
        (CAUSAL, {"input_ids": 50, "attention_mask": 0, "labels": 50}),
        (IMAGE, {"pixel_values": 0, "labels": 0}),
    ],
)
def test_ids_and_a_language_models_targets_have_a_limit(task: str, below: dict[str, int]) -> None:
    assert {row.name: row.below for row in loaded(task).inputs} == below


def test_a_model_of_few_positions_is_traced_within_them() -> None:
    made = program_of(loaded(SEQUENCE), task=SEQUENCE)
    assert made.longest == 12
    assert traced_sizes(made)[1] <= 12


def test_padding_is_masked_whatever_the_tokenizer_lists() -> None:
    torch.manual_seed(0)
    plain = transformers.BertForSequenceClassification(config_of(SEQUENCE))
    learning = attach_lora(plain, task=SEQUENCE, r=2, alpha=4, target_modules=None)
    tokenizer = word_tokenizer(model_input_names=["input_ids"])
    made = describe(learning, tokenizer, task=SEQUENCE, source="tiny")
    assert [row.name for row in made.inputs] == ["input_ids", "attention_mask", "labels"]


def test_a_tokenizer_that_knows_no_unknown_word_is_refused() -> None:
    learning = attach_lora(
        transformers.BertForSequenceClassification(config_of(SEQUENCE)),
        task=SEQUENCE,
        r=2,
        alpha=4,
        target_modules=None,
    )
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.model = models.WordLevel({"[CLS]": 2, "[SEP]": 3, "lamp": 8})
    with pytest.raises(ExportError, match=r"its tokenizer: .*Missing .*token from the vocabulary"):
        describe(learning, tokenizer, task=SEQUENCE, source="tiny")
