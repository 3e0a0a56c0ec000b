"""An ONNX file held against what a graph of ours may be, read byte by byte: no onnx, and no session is made of it before.

Numbers of fields are those of ``onnx.proto``. What is not looked into is passed over whole, as protobuf does.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

from fleetune.device_runtime.errors import one_line

_DOMAINS = (b"", b"ai.onnx", b"com.microsoft")
_OUTSIDE_OPERATORS = (b"EPContext", b"PythonOp", b"PythonOpGrad", b"ATen")
"""Of onnxruntime's own domain: they run a file, or code, that the graph names."""
_FIELDS_MAX = 400_000
"""Looked at in one file: half a second and 100 MB. The largest graph that was met has a fiftieth."""
_WHOLE_BYTES = 16 * 1024**2
_SHOWN_MAX = 120
_EMPTY = (0, 0)


class _Damaged(Exception):
    """The bytes are no protobuf message."""


_Span = tuple[int, int]
"""Where a message or text begins and ends."""


def graph_problems(path: Path) -> Iterator[str]:
    """Yield why a graph is not to be opened; nothing if it may be.

    A graph holds all that it needs (no tensor in another file), and each of its nodes runs once: no graph in a graph, which
    loops and branches have, and no functions, which may call each other. Its operators are ONNX's and onnxruntime's own.

    Args:
        path: of an ONNX file; OSError if it cannot be read.
    """
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # empty
            yield "is no ONNX graph (empty)"
            return
    with content:
        try:
            # Bytes are quicker than a mapped file, of which no more than a piece should be in memory.
            yield from _Reading(content[:] if len(content) <= _WHOLE_BYTES else content).model()
        except _Damaged as exc:
            yield f"is no ONNX graph ({exc})"


class _Reading:
    """One file on its way through."""

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self._content, self._left = content, _FIELDS_MAX

    def model(self) -> Iterator[str]:
        for number, found in self._fields((0, len(self._content))):
            if not isinstance(found, tuple):
                continue
            if number == 7:
                yield from self._graph(found)
            elif number in (20, 25):
                yield "has functions of its own or training information: each node of a graph is to run once"

    def _graph(self, graph: _Span) -> Iterator[str]:
        for number, found in self._fields(graph):
            if not isinstance(found, tuple):
                continue
            if number == 1:
                yield from self._node(found)
            elif number == 5:
                yield from self._tensor(found)
            elif number == 15:
                yield from self._sparse(found)

    def _node(self, node: _Span) -> Iterator[str]:
        operator = domain = _EMPTY
        for number, found in self._fields(node):
            if not isinstance(found, tuple):
                continue
            if number == 4:
                operator = found
            elif number == 7:
                domain = found
            elif number == 5:
                yield from self._attribute(found)
        if self._content[slice(*domain)] not in _DOMAINS:
            yield f"node {self._text(operator)!r} is of domain {self._text(domain)!r}, which nobody here runs"
        elif self._content[slice(*operator)] in _OUTSIDE_OPERATORS:
            yield f"node {self._text(operator)!r} runs what lies outside the graph"

    def _attribute(self, attribute: _Span) -> Iterator[str]:
        for number, found in self._fields(attribute):
            if not isinstance(found, tuple):
                continue
            if number in (6, 11):
                yield "has a graph in a graph (Loop, Scan, If or the like): each node of a graph is to run once"
            elif number in (5, 10):
                yield from self._tensor(found)
            elif number in (22, 23):
                yield from self._sparse(found)

    def _sparse(self, sparse: _Span) -> Iterator[str]:
        for number, found in self._fields(sparse):
            if isinstance(found, tuple) and number in (1, 2):
                yield from self._tensor(found)

    def _tensor(self, tensor: _Span) -> Iterator[str]:
        name, places, is_outside = "", [], False
        for number, found in self._fields(tensor):
            if isinstance(found, int):
                is_outside = is_outside or (number == 14 and found != 0)
            elif number == 8:
                name = self._text(found)
            elif number == 13:
                is_outside = True
                places += self._location(found)
        if is_outside:
            where = " and ".join(map(repr, places)) or "a file that it does not name"
            yield f"tensor {name!r} lies in {where}: a graph holds all that it needs"

    def _location(self, entry: _Span) -> list[str]:
        found = {n: self._text(value) for n, value in self._fields(entry) if isinstance(value, tuple)}
        return [found.get(2, "")] if found.get(1) == "location" else []

    def _text(self, span: _Span) -> str:
        start, end = span
        shown = self._content[start : min(end, start + _SHOWN_MAX + 1)]
        return one_line(shown.decode(errors="replace"), length_max=_SHOWN_MAX)

    def _fields(self, message: _Span) -> list[tuple[int, _Span | int]]:
        """Every field of a message: its number, and where it lies or, of a number, its value."""
        content, (at, end) = self._content, message
        found: list[tuple[int, _Span | int]] = []
        while at < end:
            key, at = (content[at], at + 1) if content[at] < 0x80 else self._varint(at, end)
            kind = key & 7
            if kind == 2 and at < end and content[at] < 0x80:  # nearly all of them
                size, at = content[at], at + 1
            elif kind == 2:
                size, at = self._varint(at, end)
            elif kind == 0:
                value, at = self._varint(at, end)
                found.append((key >> 3, value))
                if len(found) > self._left:
                    raise _Damaged(f"more than {_FIELDS_MAX:,} fields")
                continue
            else:
                size = {1: 8, 5: 4}.get(kind, end)
            if size > end - at or key < 8:
                raise _Damaged(f"byte {at:,} is of no message")
            if kind == 2:
                found.append((key >> 3, (at, at + size)))
                if len(found) > self._left:
                    raise _Damaged(f"more than {_FIELDS_MAX:,} fields")
            at += size
        self._left -= len(found)
        return found

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Read a number of 7 bits a byte, and where what follows it begins."""
        value = shift = 0
        while at < end and shift < 70:
            byte = self._content[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
        raise _Damaged(f"a number without end at byte {at:,}")
