"""A function in a Python file of the user's own."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import ConfigError


def load_function(code: str, *, named: str = "partition.code") -> Callable[..., Any]:
    """Load ``FILE.py:FUNCTION`` (the ``.py`` may be left out), as a module of its own; the setting is ``named`` so in errors.

    Raises:
        ConfigError: no such file or function, or the file fails when it is run.
    """
    file, _, name = code.rpartition(":")
    path = Path(file).with_suffix(".py") if file else Path()
    if not file or not path.is_file():
        raise ConfigError(f"{named} = {code!r}: expected FILE.py:FUNCTION, a file beside the configuration")
    spec = importlib.util.spec_from_file_location(f"fleetune_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as exc:
        raise ConfigError(f"{path}: cannot be loaded: {type(exc).__name__}: {exc}") from exc
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path}: no function {name!r} in it")
    found: Callable[..., Any] = function
    return found
