"""TOML tables against the structs that they should become: every mistake named with its full path and what is expected there."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import Field, Tables, broken_laws, fields_of
from fleetune.device_runtime.prepared import prepared


def read_table(path: Path) -> dict[str, Any]:
    """Read a TOML file; ConfigError if it cannot be."""
    try:
        found: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
    except (OSError, UnicodeDecodeError, msgspec.DecodeError, RecursionError) as exc:
        said = getattr(exc, "strerror", None) or exc
        raise ConfigError(f"{path}: cannot be read as TOML: {said}") from exc
    return found


def mistakes(
    kind: type[msgspec.Struct],
    table: object,
    where: str,
    *,
    tables: Tables | None = None,
    without: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> Iterator[str]:
    """Yield what keeps ``table`` from becoming a struct of ``kind``.

    Args:
        kind: the struct; its nested structs are tables too, and so is each value of a mapping to structs.
        table: what was read.
        where: path of the table, for messages; empty for a whole file.
        tables: names that an :class:`~fleetune.device_runtime.options.Option` may refer to, by kind of table.
        without: fields that the file may not give, by the path of their table.
    """
    fields = {field.name: field for field in fields_of(kind) if field.name not in without.get(where, ())}
    if not isinstance(table, Mapping):
        yield f"{where} = {table!r}: expected a table of {choices(fields)}"
        return
    start = f"{where}: " if where else ""
    yield from (f"{start}unknown key {key!r}; have: {choices(fields)}" for key in table if key not in fields)
    needed = [field.name for field in msgspec.structs.fields(kind) if field.required and field.name in fields]
    yield from (f"{start}needs {name}" for name in needed if name not in table)
    hints = get_type_hints(kind, include_extras=True)
    for key in [key for key in table if key in fields]:
        path, value = f"{where}.{key}".lstrip("."), table[key]
        for inner, one, place in _inner_tables(hints[key], value, path):
            yield from mistakes(inner, one, place, tables=tables, without=without)
        yield from _of_value(fields[key], hints[key], value, path, tables)


def _inner_tables(hint: Any, value: object, where: str) -> Iterator[tuple[type[msgspec.Struct], object, str]]:
    """The tables of a value that is one, or that has one by each name: struct, table and path."""
    inner, each = _struct_of(hint), _struct_of_each(hint)
    if inner:
        yield inner, value, where
    elif each and isinstance(value, Mapping):
        yield from ((each, one, f"{where}.{name}") for name, one in value.items())


def _of_value(field: Field, hint: Any, value: object, where: str, tables: Tables | None) -> Iterator[str]:
    if _struct_of(hint) or (_struct_of_each(hint) and isinstance(value, Mapping)):
        return
    if not _fits(value, hint):
        yield f"{where} = {value!r}: expected {_wanted(msgspec.inspect.type_info(hint))}"
    else:
        yield from (f"{where}: {said}" for said in broken_laws(field, value, tables or {}))


def _struct_of(hint: Any) -> "type[msgspec.Struct] | None":
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return next((kind for kind in kinds if _is_struct(kind)), None)


def _struct_of_each(hint: Any) -> "type[msgspec.Struct] | None":
    arguments = get_args(hint) if get_origin(hint) is dict else ()
    return arguments[1] if arguments and _is_struct(arguments[1]) else None


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _fits(value: object, hint: Any) -> bool:
    try:
        msgspec.convert(value, prepared(hint))
    except msgspec.ValidationError:
        return False
    return True


def _wanted(kind: msgspec.inspect.Type) -> str:
    """What a value must be, with its range or its choices; a type's own ``description`` goes before."""
    if isinstance(kind, msgspec.inspect.Metadata):
        return str((kind.extra_json_schema or {}).get("description") or _wanted(kind.type))
    if isinstance(kind, msgspec.inspect.VarTupleType):
        return "a list" + " of at least one" * bool(kind.min_length) + f": {_wanted(kind.item_type)}"
    if isinstance(kind, msgspec.inspect.LiteralType):
        return choices(map(str, kind.values))
    if isinstance(kind, msgspec.inspect.FloatType | msgspec.inspect.IntType):
        whole = "whole " * isinstance(kind, msgspec.inspect.IntType)
        return f"a {whole}number" + _range(kind.ge, kind.le)
    if isinstance(kind, msgspec.inspect.UnionType):
        return " or ".join(_wanted(one) for one in kind.types)
    return _OTHERS.get(type(kind), "a text")


def _range(low: float | None, high: float | None) -> str:
    return "".join(f" {word} {limit:g}" for word, limit in (("from", low), ("to", high)) if limit is not None)


_OTHERS: dict[type, str] = {
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.DictType: "a table",
    msgspec.inspect.NoneType: "nothing",
}
