"""A configuration as one TOML file, whole and with absolute paths: what a simulation keeps beside its records."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from fleetune.broker.jobs.work import OF_DEVICES
from fleetune.toolkit.simulation.config import OF_JOB, PATHS, SimulationConfig

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def config_text(config: SimulationConfig) -> str:
    """Write a configuration that :func:`load_config` reads as the same."""
    table: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    for name in OF_JOB:
        table["job"].pop(name, None)
    for name in OF_DEVICES:
        table["work"].pop(name, None)
    for *above, name in PATHS:
        holder = table[above[0]] if above else table
        if holder[name]:
            holder[name] = str(Path(holder[name]).resolve())
    return "\n".join(_lines(table)) + "\n"


def _lines(table: Mapping[str, Any], above: str = "") -> Iterator[str]:
    yield from (f"{_key(k)} = {_value(v)}" for k, v in table.items() if not isinstance(v, Mapping))
    for key, inner in table.items():
        if isinstance(inner, Mapping):
            name = f"{above}{_key(key)}"
            yield from ("", f"[{name}]")
            yield from _lines(inner, f"{name}.")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else _text(name)


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, (bool, str)):
        return _text(value)
    return repr(value)


def _text(value: bool | str) -> str:
    """As JSON has it, which TOML reads as the same."""
    return msgspec.json.encode(value).decode()
