"""Rules from a TOML file or a mapping: every mistake named with what is expected in its place."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.rules.rules import Rules, contradictions


def load_rules(source: Mapping[str, Any] | Path | str | None) -> Rules:
    """Rules from a TOML file (the table itself, or its ``[rules]``) or from a mapping of the same form; None for none.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value out of its range (all listed).
    """
    if source is None:
        return Rules()
    if isinstance(source, Mapping):
        return _checked(source, "rules")
    try:
        table = msgspec.toml.decode(Path(source).read_bytes())
    except (OSError, UnicodeDecodeError, msgspec.DecodeError) as exc:
        raise ConfigError(
            f"{source}: cannot be read as TOML: {getattr(exc, 'strerror', None) or exc}"
        ) from exc
    return _checked(table.get("rules", table), f"{source}: rules")


def _checked(table: object, where: str) -> Rules:
    problems = list(_problems(Rules, table, where))
    if not problems:
        rules = msgspec.convert(table, Rules)
        problems = [f"{where}.{problem}" for problem in contradictions(rules)]
    if problems:
        raise ConfigError("; ".join(problems))
    return rules


def _problems(kind: type[msgspec.Struct], table: object, where: str) -> Iterator[str]:
    if not isinstance(table, Mapping):
        yield f"{where} = {table!r}: expected a table of {choices(kind.__struct_fields__)}"
        return
    hints = get_type_hints(kind, include_extras=True)
    yield from (f"{where}: unknown key {key!r}; have: {choices(hints)}" for key in table if key not in hints)
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required]
    yield from (f"{where}: needs {name}" for name in needed if name not in table)
    for key in [key for key in table if key in hints]:
        inner = _struct_of(hints[key])
        if inner:
            yield from _problems(inner, table[key], f"{where}.{key}")
        elif not _fits(table[key], hints[key]):
            yield f"{where}.{key} = {table[key]!r}: expected {_wanted(msgspec.inspect.type_info(hints[key]))}"


def _struct_of(hint: Any) -> "type[msgspec.Struct] | None":
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return next((kind for kind in kinds if issubclass(kind, msgspec.Struct)), None)


def _fits(value: object, hint: Any) -> bool:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError:
        return False
    return True


def _wanted(kind: msgspec.inspect.Type) -> str:
    """What a value must be, with its range or its choices."""
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return "a list" + " of at least one" * bool(kind.min_length) + f": {_wanted(kind.item_type)}"
    if isinstance(kind, msgspec.inspect.LiteralType):
        return choices(map(str, kind.values))
    if isinstance(kind, msgspec.inspect.FloatType | msgspec.inspect.IntType):
        whole = "whole " * isinstance(kind, msgspec.inspect.IntType)
        return f"a {whole}number from {kind.ge:g} to {kind.le:g}"
    pattern = isinstance(kind, msgspec.inspect.StrType) and kind.pattern
    return "'HH:MM-HH:MM' from 00:00 to 24:00" if pattern else "a text"
