"""The arguments of ``train``, ``device`` and ``aggregate`` by name: as the structs that they make up, and as text for a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

S = TypeVar("S", bound=msgspec.Struct)


def picked(kind: type[S], arguments: Mapping[str, Any], **others: object) -> S:
    """A struct of the arguments that have its fields' names; a field without one keeps its default.

    Args:
        kind: the struct's type.
        arguments: of the function, by name: ``locals()`` where it begins.
        others: fields whose argument has another name, or that are no argument.
    """
    fields = {name: arguments[name] for name in kind.__struct_fields__ if name in arguments}
    return kind(**{**fields, **others})


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as JSON can have them: callbacks (``on_…``) are left out, paths are text."""
    return {name: _plain(value) for name, value in arguments.items() if not name.startswith("on_")}


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, Path) else value
