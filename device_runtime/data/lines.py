"""Rows of text files: JSON lines, JSON arrays, and CSV or TSV with a header; ``.gz`` too. The only file that imports csv."""

import codecs
import csv
import gzip
import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.data.rows import Format, Source, Wanted
from fleetune.device_runtime.errors import DataError, one_line
from fleetune.device_runtime.prepared import prepared

BYTE_ORDER_MARK = "\ufeff"
_WIDE = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Encodings by how a file of them begins; the mark of UTF-32 begins with that of UTF-16."""
UNPACKED_TIMES, UNPACKED_MIN = 20, 2 * 1024**2
"""A ``.gz`` unpacks to at most so many times its size, or to so many bytes: a few could take all of the memory."""
BLANK_MAX = 100_000
"""So many more lines may be blank than are not: a few bytes may unpack to millions of them, each of which is looked at."""
LINE_MAX = 64 * 1024**2
"""Bytes of UTF-8, or characters, of a line, cell or JSON array; a file of a few bytes may unpack to a line without end."""

_BLANK = " \t\r\n\f\v,"
"""Of a line of these no row is made."""
_AS_LINES = f"a JSON array of more than {LINE_MAX >> 20} MB; make JSON lines of it, as `jq -c '.[]'` does"
_SMALLER = f"a text of more than {LINE_MAX >> 20} MB; make JSON lines of its parts"

_Parse = Callable[[Iterable[str], Path], Iterator[tuple[Source, object]]]


def text_format(parse: _Parse) -> Format:
    """Make the reader of files whose lines ``parse`` turns into rows."""

    def read(path: Path, wanted: Wanted) -> Iterator[tuple[Source, object]]:
        with _open(path) as file:
            yield from parse(_lines(file, path), path)

    return read


def json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[Source, object]]:
    """Yield the object of each line that is not blank.

    Raises:
        DataError: a line that is none; names it.
    """
    for number, line in enumerate(lines, 1):
        content = line.strip()
        if not content:
            continue
        source = Source(path, number)
        if content.startswith("["):
            raise source.error(
                "a JSON array; expected an object on each line, as `jq -c '.[]'` makes them, or a file named .json"
            )
        try:
            yield source, msgspec.json.decode(content)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            raise source.error(f"not a JSON object on one line: {exc}") from exc


def json_array(lines: Iterable[str], path: Path) -> Iterator[tuple[Source, object]]:
    """Yield the objects of a JSON array; a file that begins with an object is JSON lines, whatever it is called.

    Raises:
        DataError: neither, or an array of more than LINE_MAX characters.
    """
    rest = iter(lines)
    first = next((line for line in rest if line.strip()), "")
    if first.lstrip().startswith("{"):
        yield from json_lines(chain([first], rest), path)
        return
    for number, item in enumerate(_items(_joined(first, rest, path, _AS_LINES), path), 1):
        source = Source(path, number, "item")
        try:
            yield source, msgspec.json.decode(item)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
            raise source.error(f"not a JSON object: {exc}") from exc


def separated(delimiter: str) -> _Parse:
    """Make what reads lines of cells under a header: quotes as in CSV, whatever stands between the cells."""

    def read(lines: Iterable[str], path: Path) -> Iterator[tuple[Source, object]]:
        csv.field_size_limit(LINE_MAX)  # the module's own 128 KiB are less than a text may have
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
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
                yield source, dict(zip(header, row, strict=True))
        except csv.Error as exc:
            said = _too_long("cell") if "field larger" in str(exc) else f"not CSV: {exc}"
            raise Source(path, reader.line_num).error(said) from exc

    return read


def text_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[Source, object]]:
    """Yield each line that is not blank as a text."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Source(path, number), {"text": line.strip()}


def whole_text(lines: Iterable[str], path: Path) -> Iterator[tuple[Source, object]]:
    """Yield the whole file as one text, unless it is blank, its lines as Unix ends them; DataError beyond LINE_MAX characters."""
    text = _joined("", map(_unix, lines), path, _SMALLER)
    if text.strip():
        yield Source(path, 1, "text"), {"text": text}


def _unix(line: str) -> str:
    return line.rstrip("\r\n") + "\n" if line.endswith(("\r", "\n")) else line


def as_csv(rows: Iterable[Iterable[object]]) -> bytes:
    """Write rows of cells as CSV, the first the header: commas, CRLF, quotes where a cell needs them, UTF-8."""
    written = io.StringIO(newline="")
    csv.writer(written).writerows(rows)
    return written.getvalue().encode()


def _joined(first: str, rest: Iterable[str], path: Path, remedy: str) -> str:
    pieces, size = [first], len(first)
    for line in rest:
        size += len(line)
        if size > LINE_MAX:
            raise DataError(f"{path}: {remedy}")
        pieces.append(line)
    return "".join(pieces)


def _items(content: str, path: Path) -> list[msgspec.Raw]:
    if not content:
        return []
    try:
        return msgspec.json.decode(content, type=prepared(list[msgspec.Raw]))
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise DataError(f"{path}: not a JSON array of objects: {exc}") from exc


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
    num_blank = 0
    for number, line in enumerate(_cut_at_returns(lines), 1):
        if "\0" in line:
            raise Source(path, number).error(
                "NUL bytes: a file that was cut off while it was written, or UTF-16 without its mark"
            )
        if not line.strip(_BLANK):
            num_blank += 1
            if 2 * num_blank > number + BLANK_MAX:
                raise Source(path, number).error(
                    f"{num_blank:,} blank lines so far, and {number - num_blank:,} others: damaged, or not what it is named"
                )
        yield line.lstrip(BYTE_ORDER_MARK)


def _too_long(what: str) -> str:
    return f"a {what} of more than {LINE_MAX >> 20} MB"


def _cut_at_returns(lines: Iterable[str]) -> Iterator[str]:
    for line in lines:
        yield from _at_returns(line) if "\r" in line else (line,)


def _at_returns(line: str) -> Iterator[str]:
    """Cut a line where a spreadsheet of an old Mac has ended one: behind a return without a line feed."""
    start = 0
    while (at := line.find("\r", start)) >= 0:
        end = at + (2 if line.startswith("\n", at + 1) else 1)
        yield line[start:end]
        start = end
    if start < len(line):
        yield line[start:]


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


def _header(row: list[str], source: Source) -> list[str]:
    header = [name.strip() for name in row]
    if twice := [name for name, times in Counter(header).items() if name and times > 1]:
        raise source.error(f"two columns are named {one_line(twice[0])}")
    return header


def _shown(header: list[str]) -> str:
    return one_line(", ".join(header))
