"""Out of a run: a PEFT adapter folder that Hugging Face PEFT loads, or a whole merged model."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.adapters import CONFIG, read_peft, write_peft
from fleetune.device_runtime.contracts.run_file import read_labels as labels_of_run
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.files import give_usual_modes

_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MAGNITUDE = ".lora_magnitude_vector"
_HEAD_LINEARS = ("", ".out_proj")
"""Where a classification head of transformers keeps its last linear."""


def merge(
    run: Path | str,
    *,
    out: Path | str,
    full: bool = False,
    model: str | Path | None = None,
    labels: Sequence[str] | Path | None = None,
) -> Path:
    """Write the adapter of ``run`` to ``out`` as a PEFT folder or, with ``full``, merged into its model.

    Args:
        run: a folder made by train, aggregate or demo, or a PEFT adapter folder.
        out: folder to write; may exist.
        full: load the original model with torch, merge, and save it with its tokenizer.
        model: the original model, if it is no longer where ``adapter_config.json`` says.
        labels: names of the classes, or a file of them as for export, to be kept in the merged model.

    Raises:
        ArtifactError: no adapter there, or one that is damaged (all problems listed).
        ExportError: the original model is not to be had.
    """
    folder, out = _adapter_folder(Path(run)), Path(out)
    config, arrays = read_peft(folder)
    if problems := [*_problems(config, arrays)]:
        raise ArtifactError(f"{folder}: " + "; ".join(problems))
    if full:
        _save_merged(folder, config, arrays, model=model, labels=labels, out=out)
    else:
        write_peft(out, config, arrays)
    return out


def _adapter_folder(run: Path) -> Path:
    for folder in (run / "adapter", run / "run" / "adapter", run):
        if (folder / CONFIG).is_file():
            return folder
    raise ArtifactError(
        f"{run}: no adapter here (no adapter/{CONFIG}); give the --out folder of train, aggregate or demo"
    )


def _problems(config: dict[str, Any], arrays: Arrays) -> Iterable[str]:
    """What in the tensors contradicts the configuration."""
    if config.get("peft_type") != "LORA":
        yield f"{CONFIG}: expected a LoRA configuration, got {str(config)[:80]}"
        return
    sides: dict[str, set[str]] = {}
    for name, value in sorted(arrays.items()):
        if not np.isfinite(value).all():
            yield f"{name}: holds NaN or infinity"
        if not (found := _LORA.fullmatch(name)):
            if not (_is_saved_whole(name, config) or (name.endswith(_MAGNITUDE) and config.get("use_dora"))):
                yield f"{name}: neither LoRA nor in modules_to_save"
            continue
        sides.setdefault(found["module"], set()).add(found["side"])
        rank = _rank(found["module"], config)
        if value.ndim == 2 and value.shape[found["side"] == "B"] != rank:
            yield f"{name}: shape {list(value.shape)} does not fit rank {rank}"
        if not _is_target(found["module"], config):
            yield f"{name}: {found['module']} is not among target_modules"
    if not sides:
        yield "no LoRA tensors"
    yield from (
        f"{module}: lora_A without lora_B or the reverse" for module, pair in sides.items() if len(pair) < 2
    )


def _rank(module: str, config: dict[str, Any]) -> Any:
    """The rank of a module: that of the first pattern which fits the end of its name, as peft matches them."""
    patterns = config.get("rank_pattern") or {}
    fits = (rank for pattern, rank in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(fits, config.get("r"))


def _is_target(module: str, config: dict[str, Any]) -> bool:
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _is_saved_whole(name: str, config: dict[str, Any]) -> bool:
    return any(f".{module}." in name for module in config.get("modules_to_save") or [])


def _save_merged(
    folder: Path,
    config: dict[str, Any],
    arrays: Arrays,
    *,
    model: str | Path | None,
    labels: Sequence[str] | Path | None,
    out: Path,
) -> None:
    from fleetune.toolkit.lora import load_adapter
    from fleetune.toolkit.models import load_model
    from fleetune.toolkit.tasks import TASKS

    source = str(model or config.get("base_model_name_or_path") or "")
    if not source:
        raise ConfigError(f"{folder / CONFIG} does not name its model; give --model")
    task = _task(folder, config)
    names = _class_names(folder, config, arrays, labels) if TASKS[task].has_classes else []
    plain, tokenizer = load_model(source, task=task, labels=names)
    merged = load_adapter(plain, str(folder)).merge_and_unload()
    merged.save_pretrained(str(out))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))
    give_usual_modes(out)


def _task(folder: Path, config: dict[str, Any]) -> str:
    from fleetune.toolkit.tasks import TASKS

    wanted = config.get("task_type") or ""
    found = [name for name, task in TASKS.items() if task.peft_type == wanted]
    if not found:
        raise ArtifactError(f"{folder / CONFIG}: task type {wanted!r} is none of ours: {', '.join(TASKS)}")
    return found[0]


def _class_names(
    folder: Path, config: dict[str, Any], arrays: Arrays, labels: Sequence[str] | Path | None
) -> list[str]:
    """As given, else those of the run's artifact, else numbered."""
    from fleetune.toolkit.export import read_labels

    num_classes = _num_classes(folder, config, arrays)
    names = labels_of_run(folder.parent) if labels is None else ()
    if names and len(names) != num_classes:
        raise ArtifactError(f"{folder}: a head of {num_classes} classes, but its run was about {len(names)}")
    return read_labels(labels or names or None, num_classes)


def _num_classes(folder: Path, config: dict[str, Any], arrays: Arrays) -> int:
    """Rows of the matrix that makes logits: a module that is saved whole, or the last linear inside one."""
    heads = [
        f"base_model.model.{module}{linear}.weight"
        for module in config.get("modules_to_save") or []
        for linear in _HEAD_LINEARS
    ]
    for name in heads:
        if name in arrays and arrays[name].ndim == 2:
            return int(arrays[name].shape[0])
    raise ArtifactError(
        f"{folder}: no head that says how many classes there are; looked for {', '.join(heads)}"
    )
