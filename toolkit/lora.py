"""Gives a loaded model LoRA, new or from an existing PEFT adapter, and knows the names under which PEFT saves it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
from torch import nn

from fleetune.device_runtime.contracts.adapters import read_peft
from fleetune.device_runtime.errors import ExportError, choices
from fleetune.toolkit.models import quiet, told_shortly
from fleetune.toolkit.tasks import TASKS


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
    with told_shortly("LoRA cannot be attached"):
        return peft.get_peft_model(model, peft.LoraConfig(**settings))


def load_adapter(model: Any, folder: str) -> Any:
    """The model with the PEFT adapter in ``folder``, to be trained on.

    Raises:
        ExportError: not a PEFT adapter, or one of another model.
    """
    with told_shortly(f"{folder}: not a PEFT adapter for this model"), quiet():
        learning = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
        if Path(folder).is_dir():
            _check_complete(learning, folder)
    return learning


def _check_complete(learning: Any, folder: str) -> None:
    """Refuse what peft only warns of: tensors that the model lacks, or that the folder lacks and would start anew."""
    _, arrays = read_peft(Path(folder))
    stray = sorted(set(arrays) ^ set(adapter_names(learning).values()))
    if stray:
        raise ExportError(f"{folder}: not a PEFT adapter for this model: {', '.join(stray[:5])}")


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
    return {name.rsplit(".", 1)[-1] for name in _linear_names(module)}


def _linear_names(module: nn.Module) -> set[str]:
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return {name for name, child in module.named_modules() if isinstance(child, kinds)}


def _check_targets(model: Any, targets: Sequence[str]) -> None:
    linear = _linear_names(model)
    unknown = [t for t in targets if not any(name == t or name.endswith(f".{t}") for name in linear)]
    if unknown and list(targets) != ["all-linear"]:
        raise ExportError(
            f"target module {', '.join(map(repr, unknown))}: not in this model; its linear modules are {choices(_linears(model))}"
        )
