"""A registry is one literal: ``CODECS = Table("codec", {"fp32": fp32})``."""

from collections.abc import Mapping
from typing import NoReturn, TypeVar

from fleetune.device_runtime.errors import UnknownName, choices

T = TypeVar("T")


class Table(dict[str, T]):
    """A dict whose missing key says what it is and what there is."""

    def __init__(self, kind: str, entries: Mapping[str, T]) -> None:
        super().__init__(entries)
        self.kind = kind

    def __missing__(self, name: str) -> NoReturn:
        raise UnknownName(f"no {self.kind} {name!r}; have: {choices(self)}")
