"""A PEFT model as the exporters take it: a plain module with its inputs, its loss and example batches."""

import inspect
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.exporters.model.program import Program
from fleetune.toolkit.lora import adapter_names
from fleetune.toolkit.tasks import IGNORED, TASKS, Task

_FIRST_ORDINARY_ID = 5
_LABELS = "labels"


class LoadedModel(NamedTuple):
    """A PEFT model ready to be exported, with what its data need."""

    model: Any
    architecture: str
    tokenizer: bytes | None
    pad_id: int
    max_length: int
    peft_config: dict[str, Any]
    inputs: tuple[Input, ...]


def describe(
    model: Any, tokenizer: Any, *, task: str, source: str, max_length: int | None = None
) -> LoadedModel:
    """What an export needs to know of a PEFT model."""
    config = model.config
    longest = _longest(config, tokenizer)
    text = None if tokenizer is None else tokenizer.backend_tokenizer.to_str().encode()
    pad_id = tokenizer.pad_token_id if tokenizer is not None else getattr(config, "pad_token_id", None)
    return LoadedModel(
        model.eval(),
        type(model.get_base_model()).__name__,
        text,
        pad_id or 0,
        min(max_length or longest, longest),
        _peft_config(model, source),
        _inputs(model, tokenizer, TASKS[task], pad_id or 0),
    )


def program_of(loaded: LoadedModel, *, task: str) -> Program:
    """The loaded model as the exporters take it."""
    model = loaded.model
    return Program(
        module=model,
        read_logits=lambda output: output.logits,
        loss=TASKS[task].loss,
        make_batch=lambda batch, seq: _example(loaded, batch, seq),
        inputs=loaded.inputs,
        names=adapter_names(model),
        shapes=frozenset(
            v for v in vars(model.config).values() if isinstance(v, int) and not isinstance(v, bool)
        ),
        token_loss=TASKS[task].token_loss,
    )


def _example(loaded: LoadedModel, batch: int, seq: int) -> dict[str, Tensor]:
    """Arrays of the right shapes with the upper half of the rows padded; drawn anew from one seed."""
    generator = torch.Generator().manual_seed(batch * 1009 + seq)
    config = loaded.model.config
    num_classes = getattr(config, "num_labels", 2)
    arrays: dict[str, Tensor] = {}
    for row in loaded.inputs:
        extents = {"batch": batch, "seq": seq}
        shape = [extents[d] if isinstance(d, str) else d for d in row.shape]
        if row.name == "input_ids":
            arrays[row.name] = torch.randint(
                _FIRST_ORDINARY_ID, config.vocab_size, shape, generator=generator
            )
        elif row.name == "attention_mask":
            arrays[row.name] = torch.ones(shape, dtype=torch.int64)
            arrays[row.name][1:, seq - seq // 3 :] = 0
        elif row.role == "labels":
            high = (
                num_classes
                if row.shape == ("batch",) or "ForTokenClassification" in loaded.architecture
                else config.vocab_size
            )
            arrays[row.name] = torch.randint(0, high, shape, generator=generator)
        elif row.dtype == "float32":
            arrays[row.name] = torch.randn(shape, generator=generator)
        else:
            arrays[row.name] = torch.zeros(shape, dtype=torch.int64)
    if "attention_mask" in arrays:
        padding = arrays["attention_mask"] == 0
        arrays["input_ids"][padding] = loaded.pad_id
        if arrays[_LABELS].ndim > 1:
            arrays[_LABELS][padding] = IGNORED
    return arrays


def _inputs(model: Any, tokenizer: Any, task: Task, pad_id: int) -> tuple[Input, ...]:
    config = model.config
    base = model.get_base_model()
    if "pixel_values" in inspect.signature(base.forward).parameters:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        data = [Input("pixel_values", "float32", ("batch", config.num_channels, height, width))]
    else:
        accepted = inspect.signature(base.forward).parameters
        given = tokenizer.model_input_names if tokenizer is not None else ["input_ids", "attention_mask"]
        pads = {"input_ids": pad_id}
        data = [Input(n, "int64", ("batch", "seq"), pads.get(n, 0)) for n in given if n in accepted]
    return (*data, Input(_LABELS, "int64", task.labels_shape, IGNORED, role="labels"))


def _longest(config: Any, tokenizer: Any) -> int:
    """The longest sequence that both the position table and the tokenizer allow."""
    limits = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)
    return int(min(limits))


def _peft_config(model: Any, source: str) -> dict[str, Any]:
    """The adapter's configuration just as PEFT writes it; what was a set is sorted, so that two exports are one artifact."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.peft_config["default"]
        config.base_model_name_or_path = source
        config.save_pretrained(folder)
        found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    sets = [name for name, value in vars(config).items() if isinstance(value, set)]
    return found | {name: sorted(found[name]) for name in sets}
