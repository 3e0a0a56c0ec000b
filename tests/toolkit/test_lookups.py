"""What a model reads is seen by running it: rows of its tables, where its positions begin and end, and whether it looks ahead."""

from typing import Any

import peft
import pytest
import torch
import transformers

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.lookups import look_up, sees_ahead

WIDTHS = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
TEXT = {**WIDTHS, "vocab_size": 30, "pad_token_id": 0}
NAMES = ["input_ids", "attention_mask"]
CAUSAL, CLASSES = transformers.AutoModelForCausalLM, transformers.AutoModelForSequenceClassification


def learning(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind.from_config(config)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).eval()


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.BertConfig(**TEXT, max_position_embeddings=12), 12),
        (transformers.RobertaConfig(**TEXT | {"pad_token_id": 1}, max_position_embeddings=12), 10),
        (transformers.RobertaConfig(**TEXT | {"pad_token_id": 2}, max_position_embeddings=12), 9),
        (transformers.MPNetConfig(**TEXT | {"pad_token_id": 1}, max_position_embeddings=40), 38),
        (transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=12), 12),
        (
            transformers.OPTConfig(**TEXT, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=12),
            12,
        ),
        (
            transformers.GPTJConfig(
                vocab_size=30, n_embd=8, n_layer=1, n_head=2, n_positions=12, rotary_dim=4
            ),
            12,
        ),
        (transformers.LlamaConfig(**TEXT, max_position_embeddings=12), None),
    ],
    ids=["bert", "roberta", "roberta-2", "mpnet", "gpt2", "opt", "gptj", "llama"],
)
def test_as_many_positions_as_torch_takes(config: Any, positions: int | None) -> None:
    kind = transformers.AutoModelForSequenceClassification
    config.pad_token_id = 0 if config.pad_token_id is None else config.pad_token_id
    model = learning(kind, config)
    seen = look_up(model, NAMES)
    assert seen == ({"input_ids": 30}, positions, 2)
    assert model(input_ids=torch.full((1, positions or 40), 5)).logits.isfinite().all()
    if positions is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 5))


def test_rows_are_those_of_the_table_that_an_input_looks_up() -> None:
    bert = learning(CLASSES, transformers.BertConfig(**TEXT, type_vocab_size=3))
    assert look_up(bert, [*NAMES, "token_type_ids"]).rows == {"input_ids": 30, "token_type_ids": 3}
    gpt2 = learning(CAUSAL, transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2))
    assert look_up(gpt2, [*NAMES, "token_type_ids"]).rows == {"input_ids": 30, "token_type_ids": 30}


@pytest.mark.parametrize(
    ("config", "is_ahead"),
    [
        (transformers.BertConfig(**TEXT), True),
        (transformers.BertConfig(**TEXT, is_decoder=True), False),
        (transformers.RobertaConfig(**TEXT | {"pad_token_id": 1}), True),
        (transformers.ElectraConfig(**TEXT, embedding_size=8), True),
        (transformers.LlamaConfig(**TEXT), False),
        (transformers.GPT2Config(vocab_size=30, n_embd=8, n_layer=1, n_head=2), False),
    ],
    ids=["bert", "bert-decoder", "roberta", "electra", "llama", "gpt2"],
)
def test_an_encoder_sees_the_words_it_is_to_guess(config: Any, is_ahead: bool) -> None:
    assert sees_ahead(learning(CAUSAL, config), NAMES) is is_ahead


def test_a_model_that_does_not_run_is_refused_in_one_line() -> None:
    model = learning(CLASSES, transformers.LlamaConfig(**TEXT | {"pad_token_id": None}))
    with pytest.raises(ExportError, match=r"does not run on 2 rows of 3 tokens: .*no padding token"):
        look_up(model, NAMES)
