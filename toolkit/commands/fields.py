"""A result's fields as people read them: one a line, with units; what is long, or nested, is left to ``--json``."""

from collections.abc import Callable
from typing import Any

import msgspec
from rich.console import Console

from fleetune.toolkit.live import size

_LISTED_AT_MOST = 8
_MIB = 2**20
"""What resident memory is counted in, in results (``peak_rss_mb``)."""


def show_fields(console: Console, result: object) -> None:
    """Print a result's fields, one a line."""
    fields = msgspec.to_builtins(result, enc_hook=str)
    lines = [line_of(name, value) for name, value in fields.items() if value is not None and _is_short(value)]
    width = max((len(label) for label, _ in lines), default=0)
    for label, text in lines:
        console.print(f"{label:<{width}}  {text}", markup=False)


def line_of(name: str, value: Any) -> tuple[str, str]:
    """What a field is called, and its value with the unit that the name says: MB and kB are powers of ten."""
    words = name.removeprefix("num_").split("_")
    for unit, shown in _UNITS.items():
        if unit in words and isinstance(value, (int, float)):
            return " ".join(word for word in words if word != unit) or "time", shown(value)
    if words[-2:] == ["rss", "mb"]:
        return " ".join([*words[:-2], "memory"]), size(_MIB * value)
    return " ".join(words), _plain(value)


_UNITS: dict[str, Callable[[float], str]] = {
    "bytes": size,
    "ms": lambda value: f"{value:.0f} ms",
    "s": lambda value: f"{value:.1f} s",
    "seconds": lambda value: f"{value:.1f} s",
}
"""Words of a field's name that say what its number is of."""


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_plain(one)}" for name, one in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_short(value: Any) -> bool:
    if not isinstance(value, (list, dict)):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return len(value) <= _LISTED_AT_MOST and not any(isinstance(one, (list, dict)) for one in inside)
