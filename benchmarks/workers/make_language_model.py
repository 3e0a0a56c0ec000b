"""Writes a language model of a published shape with random weights, as a transformers folder; prints one JSON object.

Usage: make_language_model.py SHAPE OUT [float32|bfloat16]. One tensor at a time is in memory. What its
configuration holds is what the model's own ``config.json`` says of sizes.
"""

import json
import sys
import warnings
from pathlib import Path
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
_SPREAD = 0.02
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def main() -> None:
    """Make it."""
    name, out, *dtypes = sys.argv[1:]
    kind, sizes = SHAPES[name]
    config = getattr(transformers, kind)(
        **sizes, tie_word_embeddings=True, max_position_embeddings=_POSITIONS
    )
    dtype = config.dtype = getattr(torch, dtypes[0] if dtypes else "float32")
    with torch.device("meta"):
        model = getattr(transformers, kind.replace("Text", "").replace("Config", "ForCausalLM"))(config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(out)
    parameters = dict(model.named_parameters())
    write(Path(out) / "model.safetensors", parameters, dtype)
    print(json.dumps({"folder": out, "parameters": sum(p.numel() for p in parameters.values())}))


def write(path: Path, like: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Write a tensor for each of ``like``: normal with a spread of 0.02, a norm's weight one and a bias zero."""
    torch.manual_seed(0)
    header, at = {}, 0
    for name, tensor in like.items():
        size = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": [*tensor.shape], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in like.items():
            values = torch.full(tensor.shape, float(name.endswith("weight")))
            if tensor.ndim > 1:
                values.normal_(0, _SPREAD)
            file.write(values.to(dtype).view(torch.uint8).numpy().data)


if __name__ == "__main__":
    main()
