"""Where a command's arguments come from: the function's defaults < a TOML file < flags."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.prepared import prepared
from fleetune.toolkit.flags import Part, claimed, structs_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Function = Callable[..., Any]
TABLES = ("aggregate", "device", "export", "status", "train", "watch")
"""Commands that read a file; one file may hold a table for each."""
SHARED = ("rules",)
"""Tables that are one value of each command that takes it."""


class MissingOption(ConfigError):
    """Neither the file nor a flag says what a command cannot do without."""


def resolve(
    function: Function,
    flags: Mapping[str, Any],
    *,
    config: Path | None = None,
    table: str = "",
    parts: Mapping[str, Part] = MappingProxyType({}),
    beside: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Keyword arguments for ``function``; what neither file nor flag says is left to its defaults.

    Args:
        function: whose parameters and type hints are the truth.
        flags: every option of the command by name; None for one that was not given.
        config: a TOML file of the same names, flat or under ``[table]``; ``[rules]`` is for all that take ``rules``.
        table: the command's name.
        parts: parameters that are structs, and which flags make them up.
        beside: types, by name, of options that are the command's own and none of the function's.

    Raises:
        ConfigError: an unreadable file, or unknown keys and wrong types (all listed).
        MissingOption: a value that is nowhere.
    """
    made = {name: flag for name, (_, flag) in claimed(parts).items()}
    hints = get_type_hints(function) | {name: flag.type for name, flag in made.items()} | dict(beside)
    found = _read(config, hints, allowed=flags, table=table) if config else {}
    found |= {name: value for name, value in flags.items() if value is not None}
    required = {*_required(function), *(n for n, flag in made.items() if flag.default is msgspec.NODEFAULT)}
    if missing := [name for name in flags if name in required and name not in found]:
        raise MissingOption(f"needs {_listed(['--' + name.replace('_', '-') for name in missing])}")
    own = {name: value for name, value in found.items() if name not in made}
    return own | structs_of({name: value for name, value in found.items() if name in made}, parts)


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _required(function: Function) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is inspect.Parameter.empty]


def _read(
    config: Path, hints: Mapping[str, Any], *, allowed: Mapping[str, Any], table: str
) -> dict[str, Any]:
    values = {key.replace("-", "_"): value for key, value in _section(config, table, allowed).items()}
    problems = [f"unknown key {key!r}; have: {choices(allowed)}" for key in values if key not in allowed]
    settings = {}
    for key in values.keys() & allowed:
        try:
            settings[key] = _convert(values[key], hints[key])
        except msgspec.ValidationError as exc:
            problems.append(f"{key} = {values[key]!r}: {exc}")
    if problems:
        raise ConfigError(f"{config}: " + "; ".join(problems))
    return settings


def _section(config: Path, table: str, allowed: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys, shared tables that are ``allowed`` and what is under ``[table]``; other commands' are left alone."""
    try:
        content = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
        raise ConfigError(f"{config}: cannot be read as TOML: {exc}") from exc
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    if unknown := tables.keys() - {*TABLES, *SHARED}:
        raise ConfigError(f"{config}: unknown table [{min(unknown)}]; have: {choices((*TABLES, *SHARED))}")
    shared = {key: tables[key] for key in SHARED if key in tables and key in allowed}
    flat = {key: value for key, value in content.items() if key not in tables}
    return shared | flat | tables.get(table, {})


def _convert(value: object, hint: Any) -> Any:
    """``value`` as ``hint`` wants it; msgspec knows no union with Path, so that one is ours."""
    kinds = set(get_args(hint)) if get_origin(hint) in (Union, UnionType) else {hint}
    if Path in kinds and isinstance(value, str):
        return Path(value)
    plain = kinds - {Path, NoneType} or {str}
    return msgspec.convert(value, prepared(reduce(or_, plain)))
