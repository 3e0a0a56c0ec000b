"""A label, as a person or a spreadsheet writes it, to the index of its class: names first, for numbers too."""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from fleetune.device_runtime.data.lines import BYTE_ORDER_MARK
from fleetune.device_runtime.data.records import Label
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.errors import one_line, some

_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_TRUTHS = ("true", "false")
_SHOWN = 10


class _Classes(NamedTuple):
    names: Sequence[str]
    places: Mapping[str, int]
    """By name."""
    numbers: Mapping[Decimal, list[int]]
    """By value, of the names that are numbers."""


def class_reader(names: Sequence[str]) -> Callable[[Label, Source], int]:
    """Make what turns a label into a class index.

    A label is the class of that name, white space around it aside; a number is the class named by it, however it is written
    (``1``, ``01``, ``1.0``); true and false are classes of such a name. A number is an index only where no class has a
    number for a name.

    Raises (what is made):
        DataError: no such class, or a number that could mean two; names the line.
    """
    classes = _Classes(names, _places(names), _numbers(names))
    known: dict[tuple[type, Label], int] = {}

    def read(label: Label, source: Source) -> int:
        key = type(label), label  # True and 1 are equal
        if key not in known:
            known[key] = _class_of(label, classes, source)
        return known[key]

    return read


def _class_of(label: Label, classes: _Classes, source: Source) -> int:
    written = str(label).lower() if isinstance(label, bool) else str(label)
    plain = _stripped(written)
    for name in (written, plain):
        if name in classes.places:
            return classes.places[name]
    if plain.lower() in _TRUTHS:
        alike = [i for i, name in enumerate(classes.names) if _stripped(name).lower() == plain.lower()]
        if len(alike) == 1:
            return alike[0]
    elif (number := _number(plain)) is not None:
        return _class_of_number(number, one_line(plain, length_max=40), classes, source)
    shown = repr(written) if isinstance(label, str) else written
    raise source.error(f"no label {one_line(shown, length_max=80)}; have: {_listed(classes.names)}")


def _class_of_number(number: Decimal, shown: str, classes: _Classes, source: Source) -> int:
    if classes.numbers:
        found = classes.numbers.get(number, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise source.error(f"label {shown} may be any of {_listed([classes.names[i] for i in found])}")
        raise source.error(
            f"label {shown} is no class; as some classes are named by numbers, a number is taken for a name, "
            f"not for an index; have: {_listed(classes.names)}"
        )
    if not 0 <= number < len(classes.names):
        raise source.error(f"label {shown} out of range; expected 0 to {len(classes.names) - 1}")
    if number != int(number):
        raise source.error(
            f"label {shown} is no whole number; expected 0 to {len(classes.names) - 1}, or a name"
        )
    return int(number)


def _places(names: Sequence[str]) -> dict[str, int]:
    """The first of equal names."""
    return {name: i for i, name in reversed(list(enumerate(names)))}


def _numbers(names: Sequence[str]) -> dict[Decimal, list[int]]:
    found: dict[Decimal, list[int]] = {}
    for i, name in enumerate(names):
        if (number := _number(_stripped(name))) is not None:
            found.setdefault(number, []).append(i)
    return found


def _number(text: str) -> Decimal | None:
    return Decimal(text) if _NUMBER.fullmatch(text) else None


def _stripped(text: str) -> str:
    return text.strip().strip(BYTE_ORDER_MARK).strip()


def _listed(names: Sequence[str]) -> str:
    return some([one_line(name, length_max=40) for name in names], at_most=_SHOWN)
