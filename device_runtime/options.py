"""A hyper-parameter is one field of a struct: type and default, and in an :class:`Option` its help and its law.

    lr: Annotated[float, Option("learning rate at its peak", above=0)] = 2e-3

The command line is made from the fields (``fleetune.toolkit.flags``), and :func:`check` holds every value to its law.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, NamedTuple, get_args, get_origin

import msgspec

from fleetune.device_runtime.errors import ConfigError, UnknownName, choices
from fleetune.device_runtime.prepared import prepared

Tables = Mapping[str, Collection[str]]
"""Names that there are, by the kind of their :class:`fleetune.device_runtime.tables.Table`."""


class Option(NamedTuple):
    """Help and law of a field.

    Not msgspec's own ``Meta``: a decoder would enforce that, and a device drop an offer that it ought to decline with a reason.
    """

    help: str = ""
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    """A limit of formats rather than of sense: it is named only to whom it stops."""
    choices: tuple[str, ...] = ()
    table: str = ""
    """Kind of the table whose names are choices too."""
    off: str = ""
    """Flag that says False; ``no-FLAG`` without it."""
    metavar: str | None = None
    alias: str = ""
    """Second name of the flag on the command line; configuration files have the first only."""


class Field(NamedTuple):
    """A field of a struct, with its type bare of annotations; ``default`` may be ``msgspec.NODEFAULT``."""

    name: str
    type: Any
    default: object
    option: Option


def fields_of(kind: type[msgspec.Struct]) -> list[Field]:
    """Return a struct's fields in their order; one without an Option has an empty one."""
    return [*_fields(kind)]


@cache
def _fields(kind: type[msgspec.Struct]) -> tuple[Field, ...]:
    return tuple(
        Field(field.name, *_unpacked(field.type, field.default)) for field in msgspec.structs.fields(kind)
    )


def values_of(struct: msgspec.Struct) -> dict[str, Any]:
    """Return the values of a struct by name; those of a nested one as ``optimizer.lr``."""
    found: dict[str, Any] = {}
    for field in fields_of(type(struct)):
        value = getattr(struct, field.name)
        inside = values_of(value) if isinstance(value, msgspec.Struct) else {}
        found |= {f"{field.name}.{name}": one for name, one in inside.items()} or {field.name: value}
    return found


def problems(struct: msgspec.Struct, tables: Tables | None = None) -> list[str]:
    """Return everything that breaks a field's law, nested structs included; names of tables not given are not looked up."""
    found: list[str] = []
    for field in fields_of(type(struct)):
        value = getattr(struct, field.name)
        if isinstance(value, msgspec.Struct):
            found += problems(value, tables)
        else:
            found += broken_laws(field, value, tables or {})
    return found


def broken_laws(field: Field, value: object, tables: Tables) -> Iterator[str]:
    """Yield what a value has against the type, the bounds and the names of its field."""
    name, option = field.name, field.option
    try:
        msgspec.convert(value, prepared(field.type))
    except msgspec.ValidationError as exc:
        yield f"{name} {value!r}: {exc}"
        return
    for one in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(one, (int, float)) and (wanted := _unmet(option, one)):
            yield f"{name} must be {wanted}, got {one}"
    if option.table and option.table not in tables:
        return
    known = {*option.choices, *tables.get(option.table, ())}
    if known and value not in known:
        yield f"no {option.table or name} {value!r}; have: {choices(known)}"


def check(*structs: msgspec.Struct, tables: Tables | None = None) -> None:
    """Hold structs to their fields' laws.

    Raises:
        ConfigError: everything that is wrong; an UnknownName if that is one unknown name.
    """
    refuse([problem for struct in structs for problem in problems(struct, tables)])


def refuse(found: list[str]) -> None:
    """Raise what was ``found`` wrong, if anything was: a ConfigError that lists it, or UnknownName for one unknown name."""
    if found:
        kind = UnknownName if len(found) == 1 and "; have: " in found[0] else ConfigError
        raise kind("; ".join(found))


def _unpacked(annotation: Any, default: object) -> tuple[Any, object, Option]:
    if get_origin(annotation) is not Annotated:
        return annotation, default, Option()
    bare, *notes = get_args(annotation)
    return bare, default, next((note for note in notes if isinstance(note, Option)), Option())


def _unmet(option: Option, value: float) -> str:
    """The bounds, if one is not kept."""
    if option.at_most is not None and value > option.at_most:
        return f"at most {option.at_most:.10g}"
    bounds = (
        ("finite", True, math.isfinite(value)),
        (f"at least {option.at_least}", option.at_least is not None, value >= (option.at_least or 0)),
        (f"above {option.above}", option.above is not None, value > (option.above or 0)),
        (f"below {option.below}", option.below is not None, value < (option.below or 0)),
    )
    if all(kept for _, is_asked, kept in bounds if is_asked):
        return ""
    return " and ".join(words for words, is_asked, _ in bounds[1:] if is_asked) or "finite"
