"""Which model an artifact was exported from: how it is named, how it is found again, how it is recognised."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fleetune.device_runtime.contracts.manifest import Origin
from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.toolkit.sources import CONFIG, looks_like_path

_AT_ONCE = 2**22
"""Values of a parameter that are float32 at a time."""
WHOLE = "base_model.model."
"""Before the name of a parameter that PEFT saves whole."""


def recorded_name(source: str) -> str:
    """``source`` as an artifact keeps it: what was typed, but no folder looks like a hub id."""
    path = Path(source)
    return f"./{path}" if path.is_dir() and not path.is_absolute() and path.parts[:1] != ("..",) else source


def origin_of(source: str, digests: Mapping[str, str], adapter: Iterable[str], *, seed: int) -> Origin:
    """Describe the model at ``source``, of whose parameters the adapter's tensors replace some."""
    return Origin("folder" if Path(source).is_dir() else "hub", frozen_digest(digests, adapter), seed)


def parameter_digests(model: Any) -> dict[str, str]:
    """SHA-256 of each parameter's shape and values in float32, by name; of whatever shares memory once."""
    from fleetune.exporters.model.mapped import one_by_one  # with torch

    return {name: _digest(parameter) for name, parameter in one_by_one(model.named_parameters())}


def frozen_digest(digests: Mapping[str, str], adapter: Iterable[str]) -> str:
    """One digest of all parameters but those that the adapter holds whole; names do not count."""
    whole = {name.removeprefix(WHOLE) for name in adapter}
    frozen = sorted(digest for name, digest in digests.items() if name not in whole)
    return hashlib.sha256("".join(frozen).encode()).hexdigest()


def find_model(given: str | Path | None, recorded: str, origin: Origin, *, ours: bool) -> tuple[str, bool]:
    """Say where the original model is, and whether the hub may be asked for it.

    Args:
        given: by the user, for this call.
        recorded: ``base_model_name_or_path`` of the adapter.
        origin: what its artifact knew of it.
        ours: whether fleetune made the adapter: before 0.2 it recorded folders and hub ids alike.

    Raises:
        ConfigError: nothing is recorded.
        ExportError: what is named is not there; a folder that is gone is not looked for on the hub.
    """
    if given is not None:
        return _checked(str(given), is_folder=isinstance(given, Path)), True
    if not recorded:
        raise ConfigError("the adapter does not name its model; give --model")
    if Path(recorded).is_dir():
        return _checked(recorded), False
    if origin.kind == "folder" or looks_like_path(recorded):
        raise ExportError(f"{recorded}: the model was this folder, which is not here; give --model")
    if origin.kind == "hub" or (not ours and "/" in recorded):
        return recorded, True
    if _is_cached(recorded):
        return recorded, False
    raise ExportError(
        f"{recorded}: no such folder, and nothing says that it is a hub id; give --model, a folder or a hub id"
    )


def _digest(parameter: Any) -> str:
    values = parameter.detach().flatten()
    found = hashlib.sha256(f"{tuple(parameter.shape)}".encode())
    for part in values.split(_AT_ONCE):  # in half precision a large table would be in memory twice over
        found.update(part.float().cpu().numpy().data.cast("B"))
    return found.hexdigest()


def _checked(source: str, *, is_folder: bool = False) -> str:
    path = Path(source)
    if path.is_dir() and not (path / CONFIG).is_file():
        raise ExportError(f"{source}: no model here (no {CONFIG})")
    if not path.is_dir() and (is_folder or path.exists() or looks_like_path(source)):
        raise ExportError(f"{source}: no such folder; --model is a local folder or a hub id such as org/name")
    return source


def _is_cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, CONFIG), str)
    except HFValidationError:
        return False
