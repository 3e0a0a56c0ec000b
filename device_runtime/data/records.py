"""Lines of labelled text on disk: JSON lines and CSV with a header (``.gz`` too), each checked against a struct."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from fleetune.device_runtime.errors import DataError, choices, one_line
from fleetune.device_runtime.tables import Table

Label = bool | int | float | str
BYTE_ORDER_MARK = "\ufeff"
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by how a file of them begins; the mark of UTF-32 begins with that of UTF-16."""
_OTHER_SEPARATORS = (";", "\t", "|")
_AFTER_RETURN = re.compile(r"(?<=\r)(?!\n)")
"""Where a line ends that a spreadsheet of an old Mac has ended."""
UNPACKED_TIMES, UNPACKED_MIN = 20, 2 * 1024**2
"""A ``.gz`` unpacks to at most so many times its size, or to so many bytes: a few could take all of the memory."""
LINE_MAX = 64 * 1024**2
"""Bytes of UTF-8, or characters, of a line or cell; a file of a few bytes may unpack to a line without end."""


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


R = TypeVar("R", bound=msgspec.Struct)


class Source(NamedTuple):
    """Where a record stands, for messages."""

    path: Path | None
    line: int

    def error(self, problem: str) -> DataError:
        """A DataError that names the file and the line."""
        where = f"{self.path}, line" if self.path else "text"
        return DataError(f"{where} {self.line}: {problem}")


def read_records(path: Path, kind: type[R]) -> Iterator[tuple[Source, R]]:
    """Yield every line of a file as ``kind`` with where it stands; blank lines and unknown fields are skipped.

    Text is UTF-8, or UTF-16 or UTF-32 with a byte order mark.

    Raises:
        DataError: missing or unreadable file, unknown format, no line at all, or a malformed line.
    """
    parse = _FORMATS[_format_of(path)]
    source = Source(path, 0)
    try:
        with _open(path) as file:
            for line, fields in parse(_lines(file, path), path):
                source = Source(path, line)
                yield source, _record(fields, kind, source)
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


def _record(fields: object, kind: type[R], source: Source) -> R:
    required, optional = _names(kind)
    if isinstance(fields, dict) and (missing := [name for name in required if name not in fields]):
        raise source.error(_missing_problem(missing, [str(name) for name in fields], required, optional))
    try:
        return msgspec.convert(fields, kind)
    except msgspec.MsgspecError as exc:
        raise source.error(str(exc)) from exc


@cache
def _names(kind: type[R]) -> tuple[list[str], list[str]]:
    """The fields that a record must have, and those that it may have."""
    fields = msgspec.structs.fields(kind)
    return [f.name for f in fields if f.required], [f.name for f in fields if not f.required]


def _missing_problem(missing: list[str], have: list[str], required: list[str], optional: list[str]) -> str:
    may = f" and perhaps {', '.join(optional)}" if optional else ""
    problem = f"no {', '.join(missing)}; there is {one_line(', '.join(have) or 'nothing')}; expected {', '.join(required)}{may}"
    used = next((mark for mark in _OTHER_SEPARATORS if len(have) == 1 and mark in have[0]), None)
    return f"{problem}, separated by ',' and not by {used!r}" if used else problem


def _open(path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Unpacked(path)) if path.suffix == ".gz" else path.open("rb")


class _Unpacked(io.RawIOBase):
    """What a ``.gz`` file unpacks to; DataError where that is out of all proportion."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self._size = path, gzip.open(path), 0  # noqa: SIM115 (closed with it)
        self._size_max = max(UNPACKED_MIN, UNPACKED_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read1(len(buffer))
        buffer[: len(piece)] = piece
        self._size += len(piece)
        if self._size > self._size_max:
            raise DataError(
                f"{self._path}: unpacks to more than {UNPACKED_TIMES} times its size and {UNPACKED_MIN >> 20} MB; "
                "if it is meant to, unpack it (gunzip)"
            )
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _lines(file: io.BufferedReader, path: Path) -> Iterator[str]:
    """The lines of a file as text, without byte order marks: files that were joined have them inside too."""
    start = file.peek(4)
    wide = next((name for mark, name in _WIDE.items() if start.startswith(mark)), None)
    lines = _utf8_lines(file, path) if wide is None else _wide_lines(file, path, wide)
    for number, line in enumerate(_cut_at_returns(lines), 1):
        if "\0" in line:
            raise Source(path, number).error(
                "NUL bytes: a file that was cut off while it was written, or UTF-16 without its mark"
            )
        yield line.lstrip(BYTE_ORDER_MARK)


def _too_long(what: str) -> str:
    return f"a {what} of more than {LINE_MAX >> 20} MB"


def _cut_at_returns(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        if "\r" in line:
            yield from filter(None, _AFTER_RETURN.split(line))
        else:
            yield line


def _utf8_lines(file: io.BufferedReader, path: Path) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: file.readline(LINE_MAX + 1), b""), 1):
        if len(line) > LINE_MAX:
            raise Source(path, number).error(_too_long("line"))
        try:
            yield line.decode()
        except UnicodeDecodeError as exc:
            raise Source(path, number).error(f"not UTF-8, as which the file should be saved: {exc}") from exc


def _wide_lines(file: io.BufferedReader, path: Path, encoding: str) -> Iterator[str]:
    num_read = 0
    try:
        with io.TextIOWrapper(file, encoding, newline="\n") as text:
            for line in iter(lambda: text.readline(LINE_MAX + 1), ""):
                if len(line) > LINE_MAX:
                    raise Source(path, num_read + 1).error(_too_long("line"))
                num_read += 1
                yield line
    except UnicodeError as exc:
        raise Source(path, num_read + 1).error(f"not {encoding.upper()}, as its mark says: {exc}") from exc


def _jsonl(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, 1):
        content = line.strip()
        if not content:
            continue
        source = Source(path, number)
        if content.startswith("["):
            raise source.error("a JSON array; expected an object on each line, as `jq -c '.[]'` makes them")
        try:
            yield number, msgspec.json.decode(content)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            raise source.error(f"not a JSON object on one line: {exc}") from exc


def as_csv(rows: Iterable[Iterable[object]]) -> bytes:
    """Write rows of cells as CSV, the first the header: commas, CRLF, quotes where a cell needs them, UTF-8."""
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def _csv(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    csv.field_size_limit(LINE_MAX)  # the module's own 128 KiB are less than a text may have
    reader = csv.reader(lines, strict=True)
    header: list[str] = []
    try:
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            source = Source(path, reader.line_num)
            if not header:
                header = _header(row, source)
                continue
            if len(row) != len(header):
                raise source.error(f"{len(row)} columns, the header has {len(header)}: {_shown(header)}")
            yield source.line, dict(zip(header, row, strict=True))
    except csv.Error as exc:
        said = _too_long("cell") if "field larger" in str(exc) else f"not CSV: {exc}"
        raise Source(path, reader.line_num).error(said) from exc


def _header(row: list[str], source: Source) -> list[str]:
    header = [name.strip() for name in row]
    if twice := [name for name, times in Counter(header).items() if name and times > 1]:
        raise source.error(f"two columns are named {one_line(twice[0])}")
    return header


def _shown(header: list[str]) -> str:
    return one_line(", ".join(header))


_FORMATS = Table("data format", {".jsonl": _jsonl, ".csv": _csv})
