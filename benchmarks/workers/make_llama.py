"""Writes a random Llama of 12 layers of 512 (46 M parameters, 8,192 tokens) as a transformers folder; prints one JSON object.

Usage: make_llama.py OUT.
"""

import json
import sys
import warnings

warnings.simplefilter("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    """Make it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(sys.argv[1])
    print(json.dumps({"folder": sys.argv[1]}))


if __name__ == "__main__":
    main()
