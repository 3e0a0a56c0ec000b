"""A row of a data file: where it stands, and the columns it must have."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.errors import DataError, one_line

_SEPARATORS = (",", ";", "\t", "|")


class Source(NamedTuple):
    """Where a record stands, for messages."""

    path: Path | None
    line: int
    unit: str = "line"
    """What is counted: lines, the rows of a table, the items of an array."""

    def error(self, problem: str) -> DataError:
        """A DataError that names the file and the line."""
        where = f"{self.path}, {self.unit}" if self.path else "text"
        return DataError(f"{where} {self.line}: {problem}")


class Wanted(NamedTuple):
    """Columns that a row must have, those that it may have, and what to say where one is missing."""

    required: Sequence[str]
    optional: Sequence[str] = ()
    remedy: str = ""
    one_of: Sequence[Sequence[str]] = ()
    """Of optional columns that go together, one group at least must be whole."""

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.required, *self.optional)

    def check(self, have: Sequence[str], source: Source) -> None:
        """Raise DataError unless ``have`` are the columns."""
        if missing := [name for name in self.required if name not in have]:
            may = f" and perhaps {', '.join(self.optional)}" if self.optional else ""
            expected = ", ".join(self.required) + may
            raise source.error(self._problem(", ".join(missing), expected, have, source))
        if self.one_of and not any(set(group) <= set(have) for group in self.one_of):
            groups = ", or ".join(" and ".join(group) for group in self.one_of)
            raise source.error(self._problem(groups, groups, have, source))

    def _problem(self, missing: str, expected: str, have: Sequence[str], source: Source) -> str:
        there = one_line(", ".join(have) or "nothing")
        problem = f"no {missing}; there is {there}; expected {expected}"
        own = "\t" if source.path and ".tsv" in source.path.suffixes else ","
        used = next(
            (mark for mark in _SEPARATORS if len(have) == 1 and mark in have[0] and mark != own), None
        )
        if used:
            return f"{problem}, separated by {own!r} and not by {used!r}"
        return f"{problem}; {self.remedy}" if self.remedy else problem


Format = Callable[[Path, Wanted], Iterator[tuple[Source, object]]]
"""A file -> its rows in order, objects by column; only the columns that are wanted need be there."""
