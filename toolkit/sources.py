"""Where a model is read from: a folder or a hub id. Loads neither torch nor transformers, so that a slip is told at once."""

import json
from pathlib import Path
from typing import Any

from fleetune.device_runtime.contracts.adapters import CONFIG as ADAPTER_CONFIG
from fleetune.device_runtime.contracts.adapters import PICKLED, WEIGHTS
from fleetune.device_runtime.errors import ExportError

CONFIG = "config.json"
_ADAPTER_WEIGHTS = (WEIGHTS, PICKLED)
_PATIENCE_S = 10.0
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_SETTINGS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
"""Those that hold no vocabulary."""


def looks_like_path(source: str) -> bool:
    """Whether ``source`` can be no hub id, which is ``name`` or ``org/name``."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1 or "\\" in source


def check_source(source: str) -> None:
    """A path must be a folder with a ``config.json``; anything else is taken for a hub id.

    Raises:
        ExportError: no such folder, no model in it, or an adapter in the place of a model.
    """
    path = Path(source)
    if path.is_dir():
        _check_folder(path)
    elif path.exists() or looks_like_path(source):
        raise ExportError(f"{source}: no such folder; MODEL is a local folder or a hub id such as org/name")


def config_of(source: str) -> dict[str, Any]:
    """What the ``config.json`` of a folder says; empty for a hub id.

    Raises:
        ExportError: a file that is no JSON object.
    """
    path = Path(source) / CONFIG
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise ExportError(f"{path}: cannot be read: {exc}") from exc
    if not isinstance(found, dict):
        raise ExportError(f"{path}: expected a JSON object")
    return found


def check_adapter_source(source: str) -> None:
    """A path must be a folder with an ``adapter_config.json``; anything else is taken for a hub id.

    Raises:
        ExportError: no such folder, or no adapter in it, or one that is not whole; one that was saved under a name lies in a
            folder of that name.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists() or looks_like_path(source):
            raise ExportError(f"{source}: no such folder; an adapter is a local folder or a hub id")
    elif not (folder / ADAPTER_CONFIG).is_file():
        inside = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
        hint = f"; there is one in {inside[0]}" if inside else ""
        raise ExportError(f"{source}: no PEFT adapter here (no {ADAPTER_CONFIG}){hint}")
    elif not _is_object(folder / ADAPTER_CONFIG):
        raise ExportError(f"{folder / ADAPTER_CONFIG}: no JSON object; save the adapter again")
    elif not any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        raise ExportError(f"{source}: an adapter without weights (no {_ADAPTER_WEIGHTS[0]}); save it again")


def check_hub(source: str, file: str) -> None:
    """Ask the hub once for what is neither a folder nor in its cache: the libraries that load it ask five times.

    Raises:
        ExportError: no such name there, or no answer.
    """
    if Path(source).is_dir():
        return
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        if not isinstance(huggingface_hub.try_to_load_from_cache(source, file), str):
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(source, file), timeout=_PATIENCE_S
            )
    except HFValidationError as exc:
        raise ExportError(f"{source}: no such folder, and no name that the hub could know") from exc
    except (GatedRepoError, EntryNotFoundError):
        return  # the name is known; what else is wrong is told by who loads it
    except RepositoryNotFoundError as exc:
        raise ExportError(
            f"{source}: no such folder, and the hub knows no such name (or not to this login)"
        ) from exc
    except Exception as exc:
        raise ExportError(
            f"{source}: no such folder, nor in the hub's cache, and the hub does not answer: {exc}"
        ) from exc


def tokenizer_files(source: str) -> list[str]:
    """Names of the files of a tokenizer in a folder; none for a hub id."""
    return [name for name in _TOKENIZER_FILES if (Path(source) / name).is_file()]


def processor_files(source: str) -> list[str]:
    """Names of the files of an image processor in a folder; none for a hub id."""
    return [name for name in _PROCESSOR_FILES if (Path(source) / name).is_file()]


def tokenizer_problem(source: str) -> str:
    """What can be seen to be wrong with the files of a tokenizer without reading them as one; empty for nothing."""
    files = tokenizer_files(source)
    broken = [name for name in files if name.endswith(".json") and not _is_object(Path(source) / name)]
    if broken:
        return f"{', '.join(broken)}: no JSON object"
    return "" if set(files) - _SETTINGS else "no vocabulary (tokenizer.json, vocab.txt or another) is there"


def _is_object(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _check_folder(path: Path) -> None:
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    if not (path / CONFIG).is_file():
        hint = f": an adapter; give its base as MODEL, and --adapter {path}" if is_adapter else ""
        raise ExportError(f"{path}: no model here (no {CONFIG}){hint}")
    if is_adapter:
        raise ExportError(
            f"{path}: a model and an adapter in one folder ({ADAPTER_CONFIG}); keep the adapter in a folder of its own"
        )
