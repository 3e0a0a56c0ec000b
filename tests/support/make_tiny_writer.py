"""Makes tests/data/tiny_writer anew: a random Llama of two layers that writes words, and a tokenizer that knows them.

Usage, from the checkout: ``python tests/support/make_tiny_writer.py``. It needs torch; the tests that read it do not.
"""

import tempfile
from pathlib import Path

import torch
import transformers
from paths import DATA
from tiny_tokenizers import byte_tokenizer

from fleetune.toolkit.export import export

FOLDER = DATA / "tiny_writer"
POSITIONS = 64


def make(out: Path) -> None:
    """Export into the folder ``out``."""
    tokenizer = byte_tokenizer(eos_token="<end>", model_max_length=POSITIONS)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "writer"
        transformers.LlamaForCausalLM(config).save_pretrained(model)
        tokenizer.save_pretrained(model)
        export(model, task="causal-lm", out=out, lora_r=2)


if __name__ == "__main__":
    make(FOLDER)
