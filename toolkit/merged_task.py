"""What a model with an adapter merged in is for, and what its classes are called."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers

from fleetune.device_runtime.contracts.provenance import Provenance
from fleetune.device_runtime.errors import ArtifactError, ConfigError, choices
from fleetune.toolkit.hearing import told_shortly
from fleetune.toolkit.labels import name_outputs, read_labels
from fleetune.toolkit.origin import WHOLE
from fleetune.toolkit.tasks import TASKS


class Adapter(NamedTuple):
    """A PEFT folder as PEFT reads it."""

    folder: Path
    config: Any
    tensors: dict[str, torch.Tensor]


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT folder; ExportError if PEFT cannot."""
    with told_shortly(f"{folder}: not a PEFT adapter"):
        config = peft.PeftConfig.from_pretrained(str(folder))
        return Adapter(folder, config, peft.load_peft_weights(str(folder), device="cpu"))


def choose_task(given: str | None, provenance: Provenance, adapter: Adapter, config: Any) -> str:
    """Return what is asked for, else what the run was for, what PEFT's file says, or what the model's own file says.

    Raises:
        ConfigError: no such task, or none can be told.
    """
    if wanted := given or provenance.task:
        TASKS[wanted]  # an unknown one raises, and names those that there are
        return wanted
    if kind := adapter.config.task_type:
        found = [name for name, task in TASKS.items() if task.peft_type == kind]
    else:
        made = {(adapter.config.auto_mapping or {}).get("base_model_class")} - {None} or {
            *(config.architectures or ())
        }
        found = [name for name in TASKS if _class_for(name, config) in made]
    if len(found) != 1:
        told = (
            f"task type {kind!r} is none of ours"
            if kind
            else "neither the adapter nor its model says what for"
        )
        raise ConfigError(f"{adapter.folder}: {told}; give --task: {choices(TASKS)}")
    return found[0]


def _class_for(task: str, config: Any) -> str:
    """Name of the class that transformers has for this task and model; empty if it has none."""
    mapping = getattr(transformers, TASKS[task].auto_class)._model_mapping
    return mapping[type(config)].__name__ if type(config) in mapping else ""


def name_classes(
    given: Sequence[str] | Path | None, provenance: Provenance, adapter: Adapter, config: Any, task: str
) -> list[str]:
    """Name the classes as given, else as the run, else as the model if it has as many, else by number; none without classes.

    Raises:
        ArtifactError: the adapter is of other classes than its run.
    """
    if not TASKS[task].has_classes:
        return []
    num_classes = _num_classes(adapter, config, task)
    names = list(provenance.labels)
    if given is not None:
        return (name_outputs if num_classes == 1 else read_labels)(given, num_classes)
    if names and len(names) != num_classes:
        raise ArtifactError(
            f"{adapter.folder}: a head of {num_classes} classes, but its run was about {len(names)}"
        )
    if not names and config.num_labels == num_classes:
        return [config.id2label[i] for i in range(num_classes)]
    return names or (name_outputs if num_classes == 1 else read_labels)(None, num_classes)


def _num_classes(adapter: Adapter, config: Any, task: str) -> int:
    """Rows of a tensor of the adapter whose size in the model follows the number of classes; without one, the model's own."""
    few, many = (_shapes(config, task, num_classes) for num_classes in (5, 7))
    heads = [n for n, shape in few.items() if shape != many[n] and WHOLE + n in adapter.tensors]
    return int(adapter.tensors[WHOLE + heads[0]].shape[0] if heads else config.num_labels)


def _shapes(config: Any, task: str, num_classes: int) -> dict[str, torch.Size]:
    sized = copy.deepcopy(config)
    sized.num_labels = num_classes
    with torch.device("meta"), told_shortly(f"{type(config).__name__}: not a model for {task}"):
        model = getattr(transformers, TASKS[task].auto_class).from_config(sized)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
