"""Lines of labelled text on disk: JSON lines and CSV with a header (``.gz`` too), each checked against a struct."""

import csv
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, TypeVar, cast

import msgspec

from fleetune.device_runtime.errors import DataError, choices
from fleetune.device_runtime.tables import Table

Label = int | str


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


R = TypeVar("R", Text, LabelledText, Tokens, LabelledTokens)


class Source(NamedTuple):
    """Where a record stands, for messages."""

    path: Path | None
    line: int

    def error(self, problem: str) -> DataError:
        """A DataError that names the file and the line."""
        where = f"{self.path}, line" if self.path else "text"
        return DataError(f"{where} {self.line}: {problem}")


def read_records(path: Path, kind: type[R]) -> Iterator[tuple[Source, R]]:
    """Yield every line of a file as ``kind`` with where it stands; unknown fields are skipped.

    Raises:
        DataError: missing or unreadable file, unknown format, no line at all, an empty or a malformed line.
    """
    parse = _FORMATS[_format_of(path)]
    source = Source(path, 0)
    try:
        with _open(path) as file:
            for line, fields in parse(file, path):
                source = Source(path, line)
                yield source, msgspec.convert(fields, kind)
    except msgspec.MsgspecError as exc:
        raise source.error(str(exc)) from exc
    except (OSError, EOFError, zlib.error) as exc:
        raise DataError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if not source.line:
        raise DataError(f"{path}: no data line in the file")


def _format_of(path: Path) -> str:
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in _FORMATS:
        known = choices([*_FORMATS, *(f"{name}.gz" for name in _FORMATS), ".npz"])
        raise DataError(f"{path}: no data format {suffix!r}; have: {known}")
    return suffix


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb"))


def _jsonl(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    for line, content in enumerate(file, 1):
        source = Source(path, line)
        if not content.strip():
            raise source.error("empty line")
        try:
            yield line, msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
            raise source.error(f"not a JSON object: {exc}") from exc


def _csv(file: IO[bytes], path: Path) -> Iterator[tuple[int, object]]:
    reader = csv.reader((line.decode("utf-8-sig") for line in file), strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            _check_row(row, header, source=Source(path, reader.line_num))
            yield reader.line_num, dict(zip(header, row, strict=True))
    except (csv.Error, UnicodeDecodeError) as exc:
        line = reader.line_num + isinstance(exc, UnicodeDecodeError)
        raise Source(path, line).error(f"not CSV: {exc}") from exc


def _check_row(row: list[str], header: list[str], *, source: Source) -> None:
    if not row:
        raise source.error("empty line")
    if len(row) != len(header):
        raise source.error(f"{len(row)} columns, the header has {len(header)}: {', '.join(header)}")


_FORMATS = Table("data format", {".jsonl": _jsonl, ".csv": _csv})
