"""``fleetune bench NAME``: run one file of benchmarks/, which lies beside the packages in a checkout."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from device_runtime.errors import ConfigError, UnknownName, choices

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def bench(name: str, *, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run ``benchmarks/NAME.py`` and return its figures.

    Each such file has one function ``measure(say)``: it tells ``say`` its progress and returns figures.

    Raises:
        UnknownName: there is no such figure.
        ConfigError: fleetune is not installed from a source checkout.
    """
    figures = {path.stem: path for path in FOLDER.glob("[a-z]*.py")}
    if not figures:
        raise ConfigError(
            f"benchmarks are run from a source checkout; there is no {FOLDER.name}/ beside this installation"
        )
    if name not in figures:
        raise UnknownName(f"no benchmark {name!r}; have: {choices(figures)}")
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", figures[name])
    if spec is None or spec.loader is None:
        raise ConfigError(f"{figures[name]} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result: dict[str, Any] = module.measure(on_progress or (lambda line: None))
    return result
