"""stories260K (a Llama of 260,032 parameters, trained on TinyStories) as a transformers folder with its tokenizer."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from paths import SHARED
from tokenizers import Tokenizer, decoders, models, normalizers, processors

MODEL = SHARED / "models" / "stories260K"
UNKNOWN, START, END = "<unk>", "<s>", "</s>"


class Shape(NamedTuple):
    """The header of a llama2.c checkpoint."""

    width: int
    hidden: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    length: int


def stories_folder(folder: Path) -> Path:
    """Convert the checkpoint and the tokenizer into ``folder``; skip the test where they are not beside the checkout."""
    if not (MODEL / "stories260K.bin").is_file():
        pytest.skip("the story model is not beside the checkout (shared/models/stories260K)")
    content = (MODEL / "stories260K.bin").read_bytes()
    shape = Shape(*np.frombuffer(content, np.int32, 7).tolist())
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=shape.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    weights = _weights(np.frombuffer(content, np.float32, offset=28), shape)
    missing = model.load_state_dict({n: torch.tensor(w) for n, w in weights.items()}, strict=False)
    assert missing.missing_keys in ([], ["lm_head.weight"])
    assert missing.unexpected_keys == []
    model.tie_weights()
    model.save_pretrained(folder)
    stories_tokenizer(shape.vocabulary).save_pretrained(folder)
    return folder


def stories_tokenizer(size: int) -> transformers.PreTrainedTokenizerFast:
    """The byte-pair encoding of ``tok512.bin``."""
    pieces = list(_pieces((MODEL / "tok512.bin").read_bytes(), size))
    vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary, _merges(pieces, vocabulary), unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=END,
        pad_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=512,
    )


def _pieces(content: bytes, size: int) -> list[tuple[str, float]]:
    """Piece and score of each token; the file writes sentencepiece's ▁ as a space."""
    found, at = [], 4
    for i in range(size):
        score, length = (
            np.frombuffer(content, np.float32, 1, at)[0],
            int(np.frombuffer(content, np.int32, 1, at + 4)[0]),
        )
        text = content[at + 8 : at + 8 + length].decode()
        found.append(((UNKNOWN, START, END)[i] if i < 3 else text.replace(" ", "▁"), float(score)))
        at += 8 + length
    return found


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, best score first."""
    words = sorted(((score, piece) for piece, score in pieces[259:] if len(piece) > 1), reverse=True)
    return [
        (piece[:cut], piece[cut:])
        for _, piece in words
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _weights(values: NDArray[np.float32], shape: Shape) -> dict[str, NDArray[np.float32]]:
    layers, width, hidden = shape.layers, shape.width, shape.hidden
    narrow = width // shape.heads * shape.groups
    rows = {
        "model.embed_tokens.weight": (shape.vocabulary, width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, narrow, width),
        "self_attn.v_proj": (layers, narrow, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, hidden, width),
        "mlp.down_proj": (layers, width, hidden),
        "mlp.up_proj": (layers, hidden, width),
        "model.norm.weight": (width,),
    }
    made, at = {}, 0
    for name, extents in rows.items():
        count = int(np.prod(extents))
        made[name] = values[at : at + count].reshape(extents)
        at += count
    made["self_attn.q_proj"] = _half_split(made["self_attn.q_proj"], shape.heads)
    made["self_attn.k_proj"] = _half_split(made["self_attn.k_proj"], shape.groups)
    whole = {n: w for n, w in made.items() if n.startswith("model.")}
    return whole | {
        f"model.layers.{i}.{n}.weight": w[i] for n, w in made.items() if n not in whole for i in range(layers)
    }


def _half_split(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """llama2.c rotates neighbours, transformers the two halves of a head: reorder the rows."""
    layers, rows, width = weight.shape
    pairs = weight.reshape(layers, heads, rows // heads // 2, 2, width)
    return pairs.transpose(0, 1, 3, 2, 4).reshape(layers, rows, width)
