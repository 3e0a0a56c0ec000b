"""A PEFT model as the exporters take it: a plain module with its inputs, its loss and example batches."""

import inspect
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.mapped import leaving
from fleetune.exporters.model.program import Program
from fleetune.toolkit.agreement import check_vocabulary, end_of_text, longest, tokenizer_file
from fleetune.toolkit.chat_templates import chat_template_of, special_tokens_of
from fleetune.toolkit.features import feature_input, feature_of
from fleetune.toolkit.hearing import Tell, told_shortly
from fleetune.toolkit.lookups import Lookups, look_up, plain, sees_ahead
from fleetune.toolkit.lora import adapter_names
from fleetune.toolkit.origin import recorded_name
from fleetune.toolkit.remembering import stepping_of
from fleetune.toolkit.tasks import IGNORED, TASKS, Task, task_of

log = logging.getLogger(__name__)
_FIRST_ORDINARY_ID = 5
_LABELS = "labels"


class LoadedModel(NamedTuple):
    """A PEFT model ready to be exported, with what its data need; ``positions`` as in :class:`Lookups`."""

    model: Any
    architecture: str
    tokenizer: bytes | None
    pad_id: int
    max_length: int
    peft_config: dict[str, Any]
    inputs: tuple[Input, ...]
    positions: int | None = None
    truncation_side: Literal["left", "right"] = "right"
    chat_template: str = ""
    special_tokens: Mapping[str, str] = {}


def describe(
    model: Any,
    tokenizer: Any,
    *,
    task: str,
    source: str,
    max_length: int | None = None,
    tell: Tell = log.info,
) -> LoadedModel:
    """What an export needs to know of a PEFT model; where model and tokenizer differ, what holds is told.

    Raises:
        ExportError: model and tokenizer do not go together, or a language model that looks ahead.
    """
    model.eval()
    names = _input_names(model, tokenizer)
    with leaving(model):
        seen = look_up(model, names) if names else Lookups({}, None, 0)
        if not TASKS[task].has_classes:
            _refuse_looking_ahead(model, names, source)
    limits = dict(seen.rows)
    if not TASKS[task].has_classes:
        limits[_LABELS] = seen.classes
    text = None if tokenizer is None else _checked_tokenizer(tokenizer, seen, task, tell)
    has_chats = tokenizer is not None and not TASKS[task].has_classes
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    return LoadedModel(
        model,
        type(model.get_base_model()).__name__,
        text,
        pad_id,
        longest(seen.positions, model.config, tokenizer, asked=max_length if names else None, tell=tell),
        _peft_config(model, source),
        _inputs(
            model,
            names,
            task_of(task, model.config),
            pads={"input_ids": pad_id},
            limits=limits,
            length=max_length,
            tell=tell,
        ),
        seen.positions,
        getattr(tokenizer, "truncation_side", "right"),
        chat_template_of(tokenizer, tell=tell) if has_chats else "",
        special_tokens_of(tokenizer) if has_chats else {},
    )


def program_of(loaded: LoadedModel, *, task: str) -> Program:
    """The loaded model as the exporters take it."""
    return _program(loaded, task_of(task, loaded.model.config), adapter_names(loaded.model))


def _program(loaded: LoadedModel, chosen: Task, names: dict[str, str]) -> Program:
    model = loaded.model
    numbers = (v for v in vars(model.config).values() if isinstance(v, int) and not isinstance(v, bool))
    return Program(
        module=model,
        read_logits=lambda output: output.logits,
        loss=chosen.loss,
        make_batch=lambda batch, seq: draw_batch(loaded, chosen, batch=batch, seq=seq),
        inputs=loaded.inputs,
        names=names,
        shapes=frozenset(numbers),
        counted=chosen.counted,
        token_loss=chosen.token_loss,
        longest=loaded.positions,
        stepping=None if chosen.has_classes else stepping_of(model, [row.name for row in loaded.inputs]),
    )


def plain_program(model: Any, readers: Sequence[Any], *, task: str) -> Program:
    """A model without adapter as the exporters take it, for its answers alone.

    Args:
        model: of transformers, float32.
        readers: its tokenizer or processor, None of one that it has not.
        task: a name of ``TASKS``.
    """
    model.eval()
    model.config.use_cache = False
    tokenizer = next((one for one in readers if hasattr(one, "all_special_tokens")), None)
    chosen, names = task_of(task, model.config), _input_names(model, tokenizer)
    seen = look_up(model, names) if names else Lookups({}, None, 0)
    limits = dict(seen.rows) | ({} if chosen.has_classes else {_LABELS: seen.classes})
    pad_id = getattr(model.config.get_text_config(), "pad_token_id", None) or 0
    inputs = _inputs(model, names, chosen, pads={"input_ids": pad_id}, limits=limits)
    loaded = LoadedModel(model, type(model).__name__, None, pad_id, 0, {}, inputs, seen.positions)
    return _program(loaded, chosen, {})


def draw_batch(loaded: LoadedModel, task: Task, *, batch: int, seq: int) -> dict[str, Tensor]:
    """An example batch: all rows but the first end in padding; equal sizes give equal arrays."""
    generator = torch.Generator().manual_seed(batch * 1009 + seq)
    extents = {"batch": batch, "seq": seq}
    shapes = {row.name: [extents[d] if isinstance(d, str) else d for d in row.shape] for row in loaded.inputs}
    arrays = {row.name: _draw(row, shapes[row.name], loaded, task, generator) for row in loaded.inputs}
    if "attention_mask" in arrays:
        padding = arrays["attention_mask"] == 0
        arrays["input_ids"][padding] = loaded.pad_id
        if arrays[_LABELS].shape == padding.shape and not task.problem_type:
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
        return torch.randint(min(_FIRST_ORDINARY_ID, row.below - 1), row.below, shape, generator=generator)
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


def _input_names(model: Any, tokenizer: Any) -> list[str]:
    """Inputs (batch, seq) of a model that reads text; none of one that sees or hears."""
    accepted = inspect.signature(plain(model).forward).parameters
    if feature_of(accepted):
        return []
    given = tokenizer.model_input_names if tokenizer is not None else []
    # without its mask a padded row would be read as if the padding were text, whatever the tokenizer lists
    return [name for name in dict.fromkeys(["input_ids", *given, "attention_mask"]) if name in accepted]


def _inputs(
    model: Any,
    names: list[str],
    task: Task,
    *,
    pads: Mapping[str, int],
    limits: Mapping[str, int],
    length: int | None = None,
    tell: Tell = log.debug,
) -> tuple[Input, ...]:
    data = [Input(n, "int64", ("batch", "seq"), pads.get(n, 0), below=limits.get(n, 0)) for n in names]
    if not names:
        feature = feature_of(inspect.signature(plain(model).forward).parameters)
        data = [feature_input(feature, model.config, length=length, tell=tell)]
    below = limits.get(_LABELS, 0)
    pad = 0 if task.problem_type else IGNORED
    return (*data, Input(_LABELS, task.labels_dtype, task.labels_shape, pad, role="labels", below=below))


def _checked_tokenizer(tokenizer: Any, seen: Lookups, task: str, tell: Tell) -> bytes:
    with told_shortly("its tokenizer"):
        check_vocabulary(tokenizer, seen.rows["input_ids"], tell=tell)
        if not TASKS[task].has_classes:
            end_of_text(tokenizer, tell=tell)
        return tokenizer_file(tokenizer, into_words=task == "token-classification", tell=tell)


def _refuse_looking_ahead(model: Any, names: list[str], source: str) -> None:
    if sees_ahead(model, names):
        raise ExportError(
            f"{source}: {type(model.get_base_model()).__name__} is an encoder: each token sees those after it, which a "
            "language model is to guess; choose a decoder or another task (of a BERT that was trained as a decoder: set "
            "is_decoder in config.json)"
        )


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
