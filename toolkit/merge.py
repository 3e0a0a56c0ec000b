"""Out of a run: a PEFT adapter folder that Hugging Face PEFT loads, or a whole merged model."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.device_runtime.arrays import Arrays, load_arrays, save_arrays, write_atomically
from fleetune.device_runtime.errors import ArtifactError, ConfigError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LORA = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_MAGNITUDE = ".lora_magnitude_vector"


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
    config, arrays = _read(folder)
    if problems := [*_problems(config, arrays)]:
        raise ArtifactError(f"{folder}: " + "; ".join(problems))
    out.mkdir(parents=True, exist_ok=True)
    if full:
        _save_merged(folder, config, model=model, names=_names(labels, arrays), out=out)
    else:
        save_arrays(out / TENSORS, arrays, metadata={"format": "pt"})
        write_atomically(out / CONFIG, json.dumps(config, indent=2).encode())
    return out


def _adapter_folder(run: Path) -> Path:
    for folder in (run / "adapter", run / "run" / "adapter", run):
        if (folder / CONFIG).is_file():
            return folder
    raise ArtifactError(
        f"{run}: no adapter here (no adapter/{CONFIG}); give the --out folder of train, aggregate or demo"
    )


def _read(folder: Path) -> tuple[dict[str, Any], Arrays]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{folder / CONFIG}: not JSON: {exc}") from exc
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ArtifactError(f"{folder / CONFIG}: expected a LoRA configuration, got {str(config)[:80]}")
    return config, load_arrays(folder / TENSORS)


def _problems(config: dict[str, Any], arrays: Arrays) -> Iterable[str]:
    """What in the tensors contradicts the configuration."""
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
    folder: Path, config: dict[str, Any], *, model: str | Path | None, names: list[str], out: Path
) -> None:
    source = str(model or config.get("base_model_name_or_path") or "")
    if not source:
        raise ConfigError(f"{folder / CONFIG} does not name its model; give --model")
    from fleetune.toolkit.lora import load_adapter
    from fleetune.toolkit.models import load_model

    plain, tokenizer = load_model(source, task=_task(folder, config), labels=names)
    load_adapter(plain, str(folder)).merge_and_unload().save_pretrained(str(out))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))


def _task(folder: Path, config: dict[str, Any]) -> str:
    from fleetune.toolkit.tasks import TASKS

    wanted = config.get("task_type") or ""
    found = [name for name, task in TASKS.items() if task.peft_type == wanted]
    if not found:
        raise ArtifactError(f"{folder / CONFIG}: task type {wanted!r} is none of ours: {', '.join(TASKS)}")
    return found[0]


def _names(labels: Sequence[str] | Path | None, arrays: Arrays) -> list[str]:
    from fleetune.toolkit.export import read_labels

    num_labels = _num_labels(arrays)
    return read_labels(labels, num_labels) if labels or num_labels else []


def _num_labels(arrays: Arrays) -> int:
    """Rows of the smallest tensor that is trained whole: the classes of a classifier."""
    whole = (n for n in arrays if not _LORA.fullmatch(n) and not n.endswith(_MAGNITUDE))
    heads = [arrays[name].shape[0] for name in whole if arrays[name].ndim]
    return int(min(heads, default=0))
