"""Labelled text on disk, each row checked against a struct; a table says which format is read how."""

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fleetune.device_runtime.data.columnar import SAVED, read_arrow, read_parquet, read_saved
from fleetune.device_runtime.data.lines import (
    json_array,
    json_lines,
    separated,
    text_format,
    text_lines,
    whole_text,
)
from fleetune.device_runtime.data.rows import Format, Source, Wanted
from fleetune.device_runtime.errors import DataError, choices
from fleetune.device_runtime.prepared import prepared
from fleetune.device_runtime.tables import Table

Label = bool | int | float | str


class Text(msgspec.Struct, frozen=True):
    """A text, or a pair of texts."""

    text: str
    text_b: str = ""


class LabelledText(Text, frozen=True, kw_only=True):
    """A text or pair with its class: an index, or a name from the manifest."""

    label: Label


class Tokens(msgspec.Struct, frozen=True):
    """A text cut into words."""

    tokens: list[str]


class LabelledTokens(Tokens, frozen=True, kw_only=True):
    """Words with a class each."""

    labels: list[Label]


Messages = str | list[dict[str, Any]]
"""Of a chat, in their order; as JSON where a cell holds nothing else."""


Tools = str | list[dict[str, Any]]
"""What the assistant of a chat may call, as JSON schemas; as JSON where a cell holds nothing else."""


class Conversation(msgspec.Struct, frozen=True):
    """Messages with ``role`` and ``content``, or with ``from`` and ``value``."""

    messages: Messages
    tools: Tools | None = None


class Pair(msgspec.Struct, frozen=True):
    """A prompt, and what is to follow; both texts, or both messages."""

    prompt: Messages
    completion: Messages
    tools: Tools | None = None


class Language(msgspec.Struct, frozen=True):
    """What a causal language model learns from: a chat, a prompt with its completion, or a text; the first that is there."""

    messages: Messages | None = None
    conversations: Messages | None = None
    """A chat as ShareGPT has it."""
    tools: Tools | None = None
    prompt: Messages | None = None
    completion: Messages | None = None
    text: str | None = None
    text_b: str = ""


LANGUAGE_FORMS = (("messages",), ("conversations",), ("prompt", "completion"), ("text",))
TEXT_FILE = ".txt"

R = TypeVar("R", bound=msgspec.Struct)


def read_document(path: Path) -> Iterator[tuple[Source, str]]:
    """Yield the whole of a plain text file, ``.txt`` or ``.txt.gz``; DataError if it cannot be read, or is blank."""
    for source, fields in _guarded(path, text_format(whole_text), Wanted(["text"])):
        yield source, str(fields["text"])  # type: ignore[index]


def is_document(path: Path) -> bool:
    """Whether ``path`` is named as a plain text file."""
    return _suffix(path) == TEXT_FILE


def read_records(
    path: Path, kind: type[R], *, remedy: str = "", one_of: Sequence[Sequence[str]] = ()
) -> Iterator[tuple[Source, R]]:
    """Yield every row of a file as ``kind`` with where it stands; blank lines and unknown fields are skipped.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark. What may be missing may be null.

    Args:
        path: a file of a format in the table below, or a folder that ``datasets`` saved.
        kind: what a row must be; its names in the file may be others (:class:`Columns`).
        remedy: said where a column is missing.
        one_of: groups of optional columns, of which one must be whole.

    Raises:
        DataError: missing or unreadable file, unknown format, no row at all, or a malformed one.
        ConfigError: the library that reads the format is not installed.
    """
    wanted = _wanted(kind)._replace(remedy=remedy, one_of=one_of)
    for source, fields in _guarded(path, _format_of(path), wanted):
        yield source, _record(fields, kind, wanted, source)


def _guarded(path: Path, read: Format, wanted: Wanted) -> Iterator[tuple[Source, object]]:
    """The rows of a file, one at least."""
    is_empty = True
    try:
        for source, fields in read(path, wanted):
            is_empty = False
            yield source, fields
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if is_empty:
        raise DataError(f"{path}: no data line in the file")


def is_saved(path: Path) -> bool:
    """Whether ``path`` is a folder that ``datasets`` saved."""
    return any((path / name).is_file() for name in SAVED)


def _format_of(path: Path) -> Format:
    if is_saved(path):
        return read_saved
    suffix = _suffix(path)
    known = _TEXT_FORMATS if path.suffix == _PACKED else _FORMATS
    if suffix not in known:
        names = choices([*_FORMATS, *(f"{name}.gz" for name in _TEXT_FORMATS), ".npz"])
        raise DataError(f"{path}: no data format {suffix!r}; have: {names}")
    return known[suffix]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == _PACKED else path.suffix


def _record(fields: object, kind: type[R], wanted: Wanted, source: Source) -> R:
    if isinstance(fields, dict):
        wanted.check([str(name) for name in fields], source)
        if None in fields.values():
            fields = {
                name: value
                for name, value in fields.items()
                if value is not None or name not in wanted.optional
            }
    try:
        return msgspec.convert(fields, prepared(kind))
    except msgspec.MsgspecError as exc:
        raise source.error(str(exc)) from exc


@cache
def _wanted(kind: type[msgspec.Struct]) -> Wanted:
    fields = msgspec.structs.fields(kind)
    return Wanted(
        [f.encode_name for f in fields if f.required], [f.encode_name for f in fields if not f.required]
    )


_PACKED = ".gz"
_TEXT_FORMATS = Table(
    "data format",
    {
        ".jsonl": text_format(json_lines),
        ".json": text_format(json_array),
        ".csv": text_format(separated(",")),
        ".tsv": text_format(separated("\t")),
        TEXT_FILE: text_format(text_lines),
    },
)
_FORMATS = Table("data format", {**_TEXT_FORMATS, ".parquet": read_parquet, ".arrow": read_arrow})
