"""Gives a loaded model LoRA, new or from an existing PEFT adapter, and knows the names under which PEFT saves it."""

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
from torch import Tensor, nn

from fleetune.device_runtime.errors import ExportError, choices, some
from fleetune.toolkit.hearing import Tell, listening, told_shortly
from fleetune.toolkit.sources import check_adapter_source
from fleetune.toolkit.tasks import TASKS

log = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"
_NAME = re.compile(r"[\w.]+")
_HEADS = ("classifier", "score")
"""What PEFT trains whole of a model for classes, by itself."""


def attach_lora(
    model: Any,
    *,
    task: str,
    r: int,
    alpha: int,
    target_modules: str | Sequence[str] | None,
    use_rslora: bool = False,
    use_dora: bool = False,
    fresh: Sequence[str] = (),
    tell: Tell = log.info,
) -> Any:
    """The model with fresh LoRA; without ``target_modules``, peft's choice for the architecture, else the blocks' linears.

    ``target_modules`` are names (``a,b`` too), ``all-linear`` or a regular expression over whole module names. Modules of
    the parameters ``fresh`` are trained whole, since their random values would be nowhere else.

    Raises:
        ExportError: a target that matches no module; lists what there is.
    """
    chosen = TASKS[task]
    settings: dict[str, Any] = {"r": r, "lora_alpha": alpha, "lora_dropout": 0.0}
    settings |= {"use_rslora": use_rslora, "use_dora": use_dora}
    heads = _HEADS if chosen.peft_type else _HEADS[:1]
    whole = [*(() if chosen.peft_type else heads), *_modules_of(fresh, beside=heads)]
    if chosen.peft_type:
        settings["task_type"] = chosen.peft_type
    if whole:
        settings["modules_to_save"] = whole
    targets = parse_targets(target_modules)
    if targets:
        _check_targets(model, targets)
    settings["target_modules"] = targets or _default_targets(model)
    with told_shortly("LoRA cannot be attached"), listening(tell):
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def parse_targets(given: str | Sequence[str] | None) -> str | list[str]:
    """Names as a list, ``all-linear`` or a regular expression as a string, as PEFT takes them; empty for None.

    A string is a list of names where all between its commas are names: letters, digits, ``_`` and ``.``.
    """
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(",") if part.strip()]
        if given != ALL_LINEAR and all(map(_NAME.fullmatch, parts)):
            return parts
        return given
    return ALL_LINEAR if list(given or ()) == [ALL_LINEAR] else list(given or ())


def load_adapter(model: Any, folder: str, *, tell: Tell = log.info) -> Any:
    """The model with the PEFT adapter in ``folder``, to be trained on; every tensor of it is in its place.

    Raises:
        ExportError: not a LoRA adapter of PEFT, or one of another model: its tensors are other than those that learn.
    """
    check_adapter_source(folder)
    with told_shortly(f"{folder}: not a PEFT adapter for this model"), listening(tell):
        config = peft.PeftConfig.from_pretrained(folder)
        if config.peft_type != peft.PeftType.LORA:
            raise ExportError(
                f"{folder}: an adapter of type {config.peft_type.value}; only LoRA can be trained on"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise ExportError(
                f"{folder}: an activated LoRA (alora_invocation_tokens), at work from some token of a text on; only LoRA that "
                "is at work on all of it can be trained on"
            )
        learning = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        _check_complete(learning, folder, peft.utils.load_peft_weights(folder, device="cpu"))
        _tell_of_adapter(config, model.config._name_or_path, tell)
    return learning


def continue_adapter(
    model: Any, folder: str, *, task: str, fresh: Sequence[str], tell: Tell = log.info
) -> Any:
    """As :func:`load_adapter`; the parameters ``fresh``, which the checkpoint lacks, must be in the adapter.

    Raises:
        ExportError: as :func:`load_adapter`, or weights that would be random for good.
    """
    learning, chosen = load_adapter(model, folder, tell=tell), TASKS[task]
    kind = learning.peft_config["default"].task_type
    if kind in {one.peft_type for one in TASKS.values()} - {chosen.peft_type}:
        tell(f"adapter: made for {kind}, its tensors fit {task}; its head goes on from the other task's")
    trained = [n for n, p in learning.named_parameters() if p.requires_grad]
    whole = {n.replace(".modules_to_save.default", "") for n in trained if "modules_to_save" in n}
    if random := [n for n in fresh if f"base_model.model.{n}" not in whole]:
        raise ExportError(
            f"{folder}: {some(random)}: neither in the model's checkpoint nor in the adapter (its task type: {kind or 'none'}), "
            "so random and never trained; train it with modules_to_save, or export without --adapter"
        )
    body = f"base_model.model.{model.base_model_prefix}."
    if chosen.has_classes and all(name.startswith(body) for name in trained):
        tell("head: the adapter trains none; the checkpoint's stays as it is")
    return learning


def adapter_names(model: Any) -> dict[str, str]:
    """Parameter name -> the name under which PEFT saves it, for every trainable parameter."""
    # "auto" would ask the hub how large the model's vocabulary was
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    names = {n: n.replace(".modules_to_save.default", "").replace(".default", "") for n in trainable}
    bare = {own: name.removesuffix(".weight") for own, name in names.items()}
    names = {own: bare[own] if bare[own] in saved else name for own, name in names.items()}
    stray = sorted(set(names.values()) ^ set(saved))
    if stray:
        is_all = model.peft_config["default"].bias == "all"
        hint = '; bias="all" is not supported: train with bias="none" or "lora_only"' if is_all else ""
        raise ExportError(f"PEFT saves other tensors than those that learn: {some(stray)}{hint}")
    return names


def _modules_of(parameters: Sequence[str], *, beside: Sequence[str]) -> list[str]:
    """Modules that hold the parameters, without those inside a module that is trained whole anyway."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return [m for m in modules if not any(part.endswith(head) for part in m.split(".") for head in beside)]


def _check_complete(learning: Any, folder: str, given: dict[str, Tensor]) -> None:
    """Refuse what peft only warns of: tensors that the model lacks, or that the folder lacks and would start anew."""
    names = adapter_names(learning)
    if problems := [*_name_problems(set(given), set(names.values()))]:
        raise ExportError(f"{folder}: not a PEFT adapter for this model: {'; '.join(problems)}")
    for own, name in names.items():
        here, there = learning.get_parameter(own), given[name]
        if not there.isfinite().all():
            raise ExportError(f"{folder}: {name} holds NaN or infinity")
        if here.shape != there.shape or not here.equal(there.to(here.dtype)):
            raise ExportError(f"{folder}: not a PEFT adapter for this model: {name} was not taken over")


def _name_problems(given: set[str], wanted: set[str]) -> Iterator[str]:
    if missing := sorted(wanted - given):
        yield f"{len(missing)} missing, {some(missing)}"
    if strange := sorted(given - wanted):
        yield f"{len(strange)} that the model has no place for, {some(strange)}"


def _tell_of_adapter(config: Any, source: str, tell: Tell) -> None:
    base = config.base_model_name_or_path
    if base and source and Path(base).name != Path(source).name:
        tell(f"adapter: made for {base}, the model is {source}")
    if config.lora_dropout:
        tell(f"adapter: lora_dropout {config.lora_dropout:g}; devices train without dropout")


def _default_targets(model: Any) -> list[str] | str:
    """What peft knows to be good for this architecture, else a pattern for every linear inside the largest list of modules."""
    known = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type)
    if known and _linears(model) & set(known):
        return list(known)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        return ALL_LINEAR
    path = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return rf".*{re.escape(path)}\.\d+\..*\.({'|'.join(sorted(_linears(lists[path])))})"


def _linears(module: nn.Module) -> set[str]:
    """Last parts of the names of the linear modules inside ``module``."""
    return {name.rsplit(".", 1)[-1] for name in _linear_names(module)}


def _linear_names(module: nn.Module) -> set[str]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {name for name, child in module.named_modules() if isinstance(child, kinds)}


def _check_targets(model: Any, targets: str | Sequence[str]) -> None:
    if targets == ALL_LINEAR:
        return
    linear = _linear_names(model)
    if isinstance(targets, str):
        unknown = [] if any(_matches(targets, name) for name in linear) else [targets]
    else:
        unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown:
        raise ExportError(
            f"target module {', '.join(map(repr, unknown))}: no linear module of this model; those are {choices(_linears(model))}"
        )


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as exc:
        raise ExportError(f"--target-modules {pattern}: no regular expression: {exc}") from exc
