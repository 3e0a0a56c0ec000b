"""Writes a language model of a published shape with random weights, as a transformers folder in fp32; prints one JSON object.

Usage: make_language_model.py SHAPE OUT. What its configuration holds is what the model's own ``config.json`` says of sizes.
"""

import json
import sys
import warnings
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "135m": (
        "LlamaConfig",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
    ),
    "270m": (
        "Gemma3TextConfig",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 512,
        },
    ),
    "0.5b": (
        "Qwen2Config",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
        },
    ),
    "1b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
        },
    ),
    "3b": (
        "LlamaConfig",
        {
            "vocab_size": 128256,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
"""SmolLM2-135M, Gemma-3-270M, Qwen2.5-0.5B, Llama-3.2-1B and -3B: all tie the head to the embedding table."""
_POSITIONS = 2048


def main() -> None:
    """Make it."""
    name, out = sys.argv[1:]
    kind, sizes = SHAPES[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        **sizes, tie_word_embeddings=True, max_position_embeddings=_POSITIONS
    )
    model = getattr(transformers, kind.replace("Text", "").replace("Config", "ForCausalLM"))(config)
    model.save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"folder": out, "parameters": parameters}))


if __name__ == "__main__":
    main()
