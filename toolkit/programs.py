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
from fleetune.toolkit.origin import recorded_name
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
    model, chosen = loaded.model, TASKS[task]
    numbers = (v for v in vars(model.config).values() if isinstance(v, int) and not isinstance(v, bool))
    return Program(
        module=model,
        read_logits=lambda output: output.logits,
        loss=chosen.loss,
        make_batch=lambda batch, seq: draw_batch(loaded, chosen, batch=batch, seq=seq),
        inputs=loaded.inputs,
        names=adapter_names(model),
        shapes=frozenset(numbers),
        token_loss=chosen.token_loss,
    )


def draw_batch(loaded: LoadedModel, task: Task, *, batch: int, seq: int) -> dict[str, Tensor]:
    """An example batch: all rows but the first end in padding; equal sizes give equal arrays."""
    generator = torch.Generator().manual_seed(batch * 1009 + seq)
    extents = {"batch": batch, "seq": seq}
    shapes = {row.name: [extents[d] if isinstance(d, str) else d for d in row.shape] for row in loaded.inputs}
    arrays = {row.name: _draw(row, shapes[row.name], loaded, task, generator) for row in loaded.inputs}
    if "attention_mask" in arrays:
        padding = arrays["attention_mask"] == 0
        arrays["input_ids"][padding] = loaded.pad_id
        if arrays[_LABELS].ndim > 1:
            arrays[_LABELS][padding] = IGNORED
    return arrays


def _draw(
    row: Input, shape: list[int], loaded: LoadedModel, task: Task, generator: torch.Generator
) -> Tensor:
    config = loaded.model.config
    if row.role == "labels":
        num_classes, vocabulary = getattr(config, "num_labels", 2), getattr(config, "vocab_size", 0)
        return task.draw_labels(shape, num_classes=num_classes, vocabulary=vocabulary, generator=generator)
    if row.name == "input_ids":
        return torch.randint(_FIRST_ORDINARY_ID, config.vocab_size, shape, generator=generator)
    if row.name == "attention_mask":
        return _mask(shape)
    if row.dtype == "float32":
        return torch.randn(shape, generator=generator)
    return torch.zeros(shape, dtype=torch.int64)


def _mask(shape: list[int]) -> Tensor:
    """Ones (batch, seq), but zeros in the last third of every row except the first."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[1:, shape[1] - shape[1] // 3 :] = 0
    return mask


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
        config.base_model_name_or_path = recorded_name(source)
        if config.task_type is None:
            base = type(model.get_base_model())
            config.auto_mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
        config.save_pretrained(folder)
        found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    sets = [name for name, value in vars(config).items() if isinstance(value, set)]
    return found | {name: sorted(found[name]) for name in sets}
