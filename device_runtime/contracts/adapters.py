"""Adapters as PEFT keeps them: a folder with ``adapter_model.safetensors`` and ``adapter_config.json``; numpy alone."""

from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.arrays import Arrays, load_arrays, save_arrays, write_atomically
from fleetune.device_runtime.contracts.artifact import check_adapter, fit_adapter
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.provenance import adapter_card, provenance_of, write_provenance
from fleetune.device_runtime.contracts.thresholds import pruned
from fleetune.device_runtime.errors import ArtifactError
from fleetune.device_runtime.files import doing, read_json

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
_SCALE: dict[str, Any] = {"r": 8, "lora_alpha": 8, "use_rslora": False, "alpha_pattern": {}}
"""What fixes the factors before BA beside the tensors themselves, and PEFT's value where a file is silent: a difference
changes outputs and no shape."""


def read_peft(folder: Path) -> tuple[dict[str, Any], Arrays]:
    """Read a PEFT folder: its configuration, and its tensors by name, in memory and writable; bfloat16 comes as float32.

    Raises:
        ArtifactError: no adapter there, one that is pickled, or a file of it that cannot be read.
    """
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLED).is_file():
            raise ArtifactError(
                f"{folder}: {PICKLED} is a pickle, which runs what is in it, and is not read; where the adapter is trusted, "
                f"PEFT makes {WEIGHTS} of it: PeftModel.from_pretrained(model, folder).save_pretrained(new_folder)"
            )
        raise ArtifactError(f"{folder}: no PEFT adapter here (no {WEIGHTS})")
    arrays = load_arrays(folder / WEIGHTS)
    config = read_json(folder / CONFIG, dict[str, Any])
    if config is None:
        raise ArtifactError(f"{folder}: no PEFT adapter here (no {CONFIG})")
    return config, arrays


def write_peft(folder: Path, config: dict[str, Any], arrays: Arrays) -> None:
    """Write a folder that ``PeftModel.from_pretrained`` loads; each file is whole or absent.

    Raises:
        StateError: the disk is full, say.
    """
    with doing("written", folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, msgspec.json.format(msgspec.json.encode(config), indent=2))
        save_arrays(folder / WEIGHTS, arrays, metadata={"format": "pt"})


def save_peft(folder: Path, manifest: Manifest, arrays: Arrays) -> None:
    """Write an artifact's adapter as a PEFT folder, with its provenance and a model card.

    Raises:
        ArtifactError: ``arrays`` are not exactly the manifest's trainable tensors, whatever thresholds are beside them.
    """
    arrays = pruned(arrays)
    check_adapter(manifest, arrays)
    write_peft(folder, manifest.peft, arrays)
    provenance = provenance_of(manifest)
    write_provenance(folder, provenance, card=adapter_card(provenance))


def load_peft(folder: Path, manifest: Manifest) -> Arrays:
    """Read a PEFT folder whose tensors are the manifest's trainable ones: float32 by name, writable, of whatever float was saved.

    Raises:
        ArtifactError: no adapter there, one of other names, shapes or scale (all differences listed), or with NaN in it.
    """
    config, arrays = read_peft(folder)
    if problems := _scale_problems(config, manifest.peft):
        raise ArtifactError(
            f"{folder / CONFIG}: {'; '.join(problems)}; to go on from this adapter, export with --adapter {folder}"
        )
    try:
        return fit_adapter(manifest, arrays)
    except ArtifactError as exc:
        raise ArtifactError(f"{folder}: {exc}") from exc


def _scale_problems(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    values = [(key, *(_setting(config, key) for config in (found, wanted))) for key in _SCALE]
    return [f"{key}: expected {there}, got {here}" for key, here, there in values if here != there]


def _setting(config: dict[str, Any], key: str) -> Any:
    value = config.get(key)
    return _SCALE[key] if value is None else value
