"""Tiny random models of many architectures, and how far a device is from torch on them at sizes that were not traced."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from anywhere import open_anywhere
from torch import Tensor

from fleetune.device_runtime.arrays import Arrays, load_arrays
from fleetune.device_runtime.commands.selfcheck import recorded_adapter, relative_error
from fleetune.device_runtime.contracts.artifact import GOLDEN, open_artifact
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.model.program import Program
from fleetune.toolkit.export import export
from fleetune.toolkit.lora import attach_lora, load_adapter
from fleetune.toolkit.models import load_model
from fleetune.toolkit.programs import describe, program_of
from fleetune.toolkit.tasks import TASKS

LABEL_NAMES = ["a", "b", "c"]
SIZES = ((1, 9), (5, 21))
"""(batch, seq) that no trace used; the second is longer than the tiny models' attention windows."""

SEQUENCE, TOKEN, CAUSAL, IMAGE = (
    "sequence-classification",
    "token-classification",
    "causal-lm",
    "image-classification",
)
DECODER, ENCODER = (SEQUENCE, TOKEN, CAUSAL), (SEQUENCE, TOKEN)


class Architecture(NamedTuple):
    """``config`` is a class of transformers, ``settings`` its arguments, ``tasks`` those that it has a head for."""

    config: str
    settings: dict[str, Any]
    tasks: tuple[str, ...]


_WIDTHS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_PAD = 3
"""Not what anything falls back to."""
_TEXT = {**_WIDTHS, "vocab_size": 128, "max_position_embeddings": 128, "pad_token_id": _PAD}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {**_WIDTHS, "image_size": 16, "patch_size": 4}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GPT = {"vocab_size": 128, "pad_token_id": _PAD, "bos_token_id": 1, "eos_token_id": 2}

NAMED: dict[str, Architecture] = {
    "llama": Architecture("LlamaConfig", {**_GROUPED, "tie_word_embeddings": True}, DECODER),
    "qwen2": Architecture("Qwen2Config", _GROUPED, DECODER),
    "qwen3": Architecture("Qwen3Config", {**_GROUPED, "head_dim": 8}, DECODER),
    "gemma3": Architecture(
        "Gemma3TextConfig", {**_GROUPED, **_ALTERNATING, "head_dim": 8}, (SEQUENCE, CAUSAL)
    ),
    "smollm3": Architecture("SmolLM3Config", _GROUPED, DECODER),
    "phi": Architecture("PhiConfig", _TEXT, DECODER),
    "gpt2": Architecture(
        "GPT2Config", {**_GPT, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}, DECODER
    ),
    "mixtral": Architecture("MixtralConfig", {**_GROUPED, "num_local_experts": 4}, DECODER),
    "bert": Architecture("BertConfig", _TEXT, ENCODER),
    "roberta": Architecture(
        "RobertaConfig", {**_TEXT, "max_position_embeddings": 130, "pad_token_id": 1}, ENCODER
    ),
    "distilbert": Architecture(
        "DistilBertConfig",
        {
            "vocab_size": 128,
            "dim": 32,
            "n_layers": 4,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 128,
        },
        ENCODER,
    ),
    "albert": Architecture("AlbertConfig", {**_TEXT, "embedding_size": 16}, ENCODER),
    "deberta-v2": Architecture(
        "DebertaV2Config",
        {**_TEXT, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        ENCODER,
    ),
    "modernbert": Architecture(
        "ModernBertConfig",
        {
            **_TEXT,
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        ENCODER,
    ),
    "vit": Architecture("ViTConfig", _IMAGE, (IMAGE,)),
}
"""The architectures that fleetune promises."""

OTHERS: dict[str, Architecture] = {
    "phi3": Architecture("Phi3Config", _GROUPED, (CAUSAL,)),
    "mistral": Architecture("MistralConfig", {**_GROUPED, "sliding_window": 16}, (CAUSAL,)),
    "gemma2": Architecture("Gemma2Config", {**_GROUPED, "head_dim": 8, "sliding_window": 16}, (CAUSAL,)),
    "falcon": Architecture("FalconConfig", {**_TEXT, "alibi": False}, (CAUSAL,)),
    "gpt-neox": Architecture("GPTNeoXConfig", _TEXT, (CAUSAL,)),
    "opt": Architecture("OPTConfig", {**_TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32}, (CAUSAL,)),
    "bloom": Architecture("BloomConfig", {**_GPT, "hidden_size": 32, "n_layer": 4, "n_head": 4}, (CAUSAL,)),
    "electra": Architecture("ElectraConfig", {**_TEXT, "embedding_size": 16}, (SEQUENCE,)),
    "mpnet": Architecture("MPNetConfig", {**_TEXT, "pad_token_id": 1}, (SEQUENCE,)),
    "bart": Architecture(
        "BartConfig",
        {
            "vocab_size": 128,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 128,
        },
        (SEQUENCE,),
    ),
    "t5": Architecture(
        "T5Config",
        {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
        (SEQUENCE,),
    ),
    "deit": Architecture("DeiTConfig", {**_IMAGE, "architectures": ["DeiTForImageClassification"]}, (IMAGE,)),
    "dinov2": Architecture("Dinov2Config", _IMAGE, (IMAGE,)),
    "convnext": Architecture(
        "ConvNextConfig",
        {"image_size": 32, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]},
        (IMAGE,),
    ),
    "swin": Architecture(
        "SwinConfig",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [1, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        (IMAGE,),
    ),
}
"""Others that people have; those that cannot be exported must be refused with a reason."""

ARCHITECTURES = NAMED | OTHERS
CASES = [(name, task) for name, row in ARCHITECTURES.items() for task in row.tasks]


def save_tiny(name: str, task: str, folder: Path, **changes: Any) -> Path:
    """A random model of the architecture, with ``changes`` of its settings, as a folder without tokenizer or image processor."""
    row = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = getattr(transformers, row.config)(**row.settings | changes)
    if TASKS[task].has_classes:
        config.num_labels = len(LABEL_NAMES)
    getattr(transformers, TASKS[task].auto_class).from_config(config).save_pretrained(folder)
    return folder


def export_tiny(name: str, task: str, folder: Path, **settings: Any) -> Path:
    """A tiny model of the architecture, exported; the artifact is in ``folder/artifact``, the model in ``folder/model``."""
    model = save_tiny(name, task, folder / "model")
    return export_folder(model, task, folder / "artifact", **settings)


def export_folder(model: Path, task: str, out: Path, **settings: Any) -> Path:
    """``model`` exported to ``out`` with the labels of this file."""
    labels = LABEL_NAMES if TASKS[task].has_classes else None
    export(model, task=task, labels=labels, out=out, **settings)
    return out


def torch_program(model: Path, task: str, *, adapter: Path | None = None, **lora: Any) -> Program:
    """What an export of ``model`` starts from: the same weights and LoRA in torch."""
    labels = LABEL_NAMES if TASKS[task].has_classes else []
    plain, tokenizer = load_model(str(model), task=task, labels=labels)
    given = {"r": 8, "alpha": 16, "target_modules": None, **lora}
    learning = load_adapter(plain, str(adapter)) if adapter else attach_lora(plain, task=task, **given)
    return program_of(describe(learning, tokenizer, task=task, source=str(model)), task=task)


def errors_at_sizes(artifact_dir: Path, program: Program) -> dict[str, float]:
    """Largest relative error per size and plan: the stack against eager torch, with the golden step's perturbed adapter."""
    artifact = open_artifact(artifact_dir, verify=False)
    adapter = recorded_adapter(artifact, load_arrays(artifact_dir / GOLDEN))
    _give(program, adapter)
    anatomy = find_anatomy(program, batch=2, seq=8)
    layers = len(anatomy.calls)
    found = {}
    with open_anywhere(artifact) as stack:
        for batch_size, seq in SIZES:
            for label, batch in _padded_both_ways(program.make_batch(batch_size, seq)):
                for dropped in ((), tuple(range(0, layers, 2))):
                    expected = torch_step(program, anatomy, batch, dropped=dropped)
                    arrays = {n: t.numpy() for n, t in batch.items()}
                    result = stack.step(arrays, dropping(layers, dropped), adapter, keep_logits=True)
                    actual = {"loss": np.float32(result.loss), "logits": result.logits}
                    actual |= {f"grad.{n}": g for n, g in result.grads.items()}
                    found[f"{batch_size}x{seq} {label} without {list(dropped)}"] = _worst(actual, expected)
    return found


def _worst(actual: Arrays, expected: dict[str, Tensor]) -> float:
    if actual.keys() != expected.keys():
        return float("inf")
    return max(relative_error(actual[name], tensor.numpy()) for name, tensor in expected.items())


def _padded_both_ways(batch: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The batch padded on the right as it comes and, where there is padding, on the left."""
    yield "padded right", batch
    if "attention_mask" in batch and not batch["attention_mask"].all():
        yield "padded left", {n: t.flip(1) if t.ndim > 1 else t for n, t in batch.items()}


def _give(program: Program, adapter: Arrays) -> None:
    parameters = {program.names.get(n, n): p for n, p in program.module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, array in adapter.items():
            parameters[name].copy_(torch.from_numpy(np.array(array)))
