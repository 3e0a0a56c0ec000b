"""``fleetune bench NAME``: run one file of benchmarks/, which lies beside the packages in a checkout."""

import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from fleetune.device_runtime.errors import ConfigError, UnknownName, choices
from fleetune.toolkit.charts import draw

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def bench(
    name: str,
    *,
    only: Sequence[str] | None = None,
    repeats: int | None = None,
    threads: int | None = None,
    chart: Path | str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Run ``benchmarks/NAME.py`` and return its figures.

    Each such file has one function ``measure(say)``: it tells ``say`` its progress and returns figures.

    Args:
        name: which file.
        only: what of it to measure; None for everything.
        repeats: interleaved repeats; None for as many as the file says.
        threads: of each process measured; None for as many as the file says.
        chart: SVG file to draw the figures into.
        on_progress: called with lines.

    Raises:
        UnknownName: there is no such figure.
        ConfigError: fleetune is not installed from a source checkout, or this figure cannot be asked for that way.
    """
    known = figures()
    if not known:
        raise ConfigError(
            f"benchmarks are run from a source checkout; there is no {FOLDER.name}/ beside this installation"
        )
    name = name.replace("_", "-")
    if name not in known:
        raise UnknownName(f"no benchmark {name!r}; have: {choices(known)}")
    module = load(known[name].stem)
    asked = {"only": only, "repeats": repeats, "threads": threads}
    found = _measured(name, module.measure, on_progress, {n: v for n, v in asked.items() if v is not None})
    drawn = found.pop("chart", None)
    if chart:
        if drawn is None:
            raise ConfigError(f"benchmark {name} has no chart")
        draw(Path(chart), (module.__doc__ or name).partition("\n")[0], drawn)
    return found


def figures() -> dict[str, Path]:
    """Benchmarks by the name that ``bench`` takes, sorted; none where there is no checkout."""
    return {path.stem.replace("_", "-"): path for path in sorted(FOLDER.glob("[a-z]*.py"))}


def load(name: str) -> ModuleType:
    """Import ``benchmarks.NAME``: a package of the checkout, which is not on the path."""
    if "benchmarks" not in sys.modules:
        package = ModuleType("benchmarks", "Figures that fleetune promises: one file each.")
        package.__path__ = [str(FOLDER)]
        sys.modules["benchmarks"] = package
    return import_module(f"benchmarks.{name}")


def _measured(
    name: str,
    measure: Callable[..., dict[str, Any]],
    on_progress: Callable[[str], None] | None,
    asked: dict[str, Any],
) -> dict[str, Any]:
    if strange := sorted(asked.keys() - inspect.signature(measure).parameters):
        raise ConfigError(f"benchmark {name} takes no {' and no '.join(f'--{n}' for n in strange)}")
    if low := sorted(n for n in asked.keys() & {"repeats", "threads"} if asked[n] < 1):
        raise ConfigError(f"--{low[0]} {asked[low[0]]}: expected 1 or more")
    return measure(on_progress or (lambda line: None), **asked)
