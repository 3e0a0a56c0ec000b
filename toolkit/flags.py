"""From structs to flags and back: the command line has one flag for each field, and no other list of them."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.device_runtime.options import Field, Option, fields_of

Source = msgspec.Struct | type[msgspec.Struct]
Path = tuple[str, ...]
"""Field, or fields from a struct down to a nested one's."""


class Part(NamedTuple):
    """A struct among a command's arguments, with its nested structs flat."""

    source: Source
    """The struct's type, or one of them whose values are the defaults."""
    names: Mapping[str, str] = {}
    """Flag of a field (``policy.shape``) that has another name than the field."""
    without: Collection[str] = ()
    """Fields that are no flags."""
    more: Mapping[str, str] = {}
    """One more choice of a field, which the command resolves."""


class Flag(NamedTuple):
    """An option of the command line; ``default`` is ``msgspec.NODEFAULT`` where it must be given."""

    name: str
    path: Path
    type: Any
    default: object
    option: Option


def flags_of(part: Part) -> list[Flag]:
    """Return a part's flags. A nested struct's ``name`` is called as the struct is: ``policy.name`` is ``policy``.

    Raises:
        ValueError: the part names a field that is not there.
    """
    fields = {".".join(path): (path, field) for path, field in _leaves(part.source)}
    if strange := {*part.names, *part.without, *part.more} - fields.keys():
        raise ValueError(f"{_type_of(part.source).__name__} has no field {choices(strange)}")
    return [
        Flag(
            part.names.get(name, _own_name(path)),
            path,
            field.type,
            field.default,
            _widened(field, part.more.get(name)),
        )
        for name, (path, field) in fields.items()
        if name not in part.without
    ]


def claimed(parts: Mapping[str, Part]) -> dict[str, tuple[str, Flag]]:
    """Return whose each flag is, and which: (parameter, flag) by the flag's name.

    Raises:
        ValueError: two fields claim one flag.
    """
    found: dict[str, tuple[str, Flag]] = {}
    for parameter, part in parts.items():
        for flag in flags_of(part):
            if flag.name in found:
                fields = (f"{of}.{'.'.join(it.path)}" for of, it in (found[flag.name], (parameter, flag)))
                raise ValueError(f"flag {flag.name!r} is claimed by {' and by '.join(fields)}")
            found[flag.name] = parameter, flag
    return found


def structs_of(flags: Mapping[str, Any], parts: Mapping[str, Part]) -> dict[str, msgspec.Struct]:
    """Make the structs of ``parts`` from flags by name; a field whose flag is not given keeps the part's default.

    Raises:
        UnknownName: a flag that no struct claims; lists those that are.
    """
    owners = claimed(parts)
    if strange := sorted(flags.keys() - owners):
        raise UnknownName(f"no option {strange[0]!r}; have: {choices(owners)}")
    return {
        parameter: _made(
            part.source,
            {owners[name][1].path: value for name, value in flags.items() if owners[name][0] == parameter},
        )
        for parameter, part in parts.items()
    }


def _widened(field: Field, more: str | None) -> Option:
    return field.option._replace(choices=(*field.option.choices, more)) if more else field.option


def _leaves(source: Source, above: Path = ()) -> Iterator[tuple[Path, Field]]:
    """Fields that are no structs, however deep, with the defaults of ``source``."""
    for field in _fields(source):
        path = (*above, field.name)
        if isinstance(field.default, msgspec.Struct):
            yield from _leaves(field.default, path)
        else:
            yield path, field


def _fields(source: Source) -> list[Field]:
    fields = fields_of(_type_of(source))
    if isinstance(source, type):
        return fields
    return [field._replace(default=getattr(source, field.name)) for field in fields]


def _made(source: Source, given: Mapping[Path, Any]) -> msgspec.Struct:
    values = {path[0]: value for path, value in given.items() if len(path) == 1}
    for field in _fields(source):
        inner = {path[1:]: value for path, value in given.items() if path[0] == field.name and path[1:]}
        if inner and isinstance(field.default, msgspec.Struct):
            values[field.name] = _made(field.default, inner)
    return source(**values) if isinstance(source, type) else msgspec.structs.replace(source, **values)


def _own_name(path: Path) -> str:
    return path[-2] if path[-1] == "name" and len(path) > 1 else path[-1]


def _type_of(source: Source) -> type[msgspec.Struct]:
    return source if isinstance(source, type) else type(source)
