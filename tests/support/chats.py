"""Chats to learn from, made from nothing; a tokenizer with each of the kinds of chat template that models have; tiny models."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_tokenizers import byte_tokenizer

Messages = list[dict[str, str]]

_TURN = "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
_ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "chatml": "{% for message in messages %}"
    "{% if loop.first and message.role != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    + _TURN
    + "{% endfor %}"
    + _ASK,
    "marked": "{% for message in messages %}{% if message.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _ASK,
    "alternating": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "thinking": "{% for message in messages %}{% set last = loop.last %}{% if message.role == 'assistant' and last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}{% else %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _ASK,
    "tools": "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ (tool | tojson) + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{% if message.tool_calls %}{{ '<|im_start|>assistant\n' }}"
    "{% for call in message.tool_calls %}{{ '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}{{ '<|im_start|>user\n<answer>' + message.content + '</answer><|im_end|>\n' }}{% else %}"
    + _TURN
    + "{% endif %}{% endfor %}"
    + _ASK,
}
"""As Qwen2.5 has it; with the answers marked; as Llama 2 and Mistral have it; as Qwen3 has it: the last answer is another; and
one with tools, about as Qwen2.5 has them."""
PLACES, THINGS = ("hall", "bed", "in the hall"), ("lamp", "heater")


def threads(number: int) -> list[Messages]:
    """Chats of one to three questions with their answers, the same ones every time."""
    return [[message for turn in range(1 + i % 3) for message in _turn(i, turn)] for i in range(number)]


def _turn(i: int, turn: int) -> Messages:
    thing, place, state = (
        THINGS[(i + turn) % 2],
        PLACES[(i // 2 + turn) % 3],
        ("on", "off")[(i // 3 + turn) % 2],
    )
    ask = {"role": "user", "content": f"turn the {thing} {state} in the {place}, please: {i % 7}"}
    return [ask, {"role": "assistant", "content": f"the {thing} in the {place} is {state}"}]


def write_chats(path: Path, chats: Sequence[Messages]) -> Path:
    """One a line, in ``messages``."""
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    return path


def chat_tokenizer(template: str | None = "chatml") -> Any:
    """A byte-level BPE with the special tokens of the templates; ``<|im_end|>`` ends a text."""
    made = byte_tokenizer(chat_template=TEMPLATES.get(template or ""))
    made.add_special_tokens(
        {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    )
    return made


def chat_model(folder: Path, *, kind: str = "Llama", template: str | None = "marked") -> Path:
    """A random model of two layers and some ten thousand parameters with that tokenizer."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<end>"),
        "tie_word_embeddings": True,
    }
    if kind.startswith("Gemma"):
        sizes["head_dim"] = 4
    if kind == "GPT2":
        names = {
            "num_hidden_layers": "n_layer",
            "hidden_size": "n_embd",
            "max_position_embeddings": "n_positions",
        }
        names |= {"num_attention_heads": "n_head", "intermediate_size": "n_inner"}
        sizes = {names.get(name, name): size for name, size in sizes.items() if name != "num_key_value_heads"}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
