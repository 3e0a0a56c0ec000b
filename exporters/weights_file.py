"""Writes ``base.safetensors`` so that a device can map it: tensors on 64-byte borders, each block on pages of its own."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fleetune.device_runtime.errors import ExportError, choices

ALIGNMENT_BYTES = 64
PAGE_BYTES = 4096
_DTYPES = {
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


class Placed(NamedTuple):
    """A tensor as it was laid out, and the byte of the file at which it starts."""

    name: str
    tensor: Tensor
    offset: int


class _Entry(NamedTuple):
    """One entry of the header; ``start`` and ``end`` count bytes from the end of the header. A filler has no tensor."""

    name: str
    dtype: str
    shape: list[int]
    start: int
    end: int
    tensor: Tensor | None = None


def write_base(
    path: Path,
    spans: Sequence[Sequence[tuple[str, Tensor]]],
    *,
    contents: Iterable[Tensor] | None = None,
) -> list[Placed]:
    """Write each span (prelude, every block, head) as one contiguous run of pages; fillers are tensors named ``_fill.N``.

    safetensors allows no holes, so what alignment leaves over is a uint8 tensor that nobody reads.

    Args:
        path: the file.
        spans: named tensors; with ``contents`` dtype and shape are all that counts of them.
        contents: the tensors themselves, in that order; each is asked for when the one before is written.

    Raises:
        ExportError: tensors of a dtype that devices do not read (all named).
    """
    strange = [f"{n} is {t.dtype}" for span in spans for n, t in span if str(t.dtype) not in _DTYPES]
    if strange:
        raise ExportError(f"{', '.join(strange)}; a device reads {choices(_DTYPES)}")
    entries = list(_layout(spans))
    header = _header(entries)
    with path.open("wb") as file:
        file.write(header)
        given = iter(contents if contents is not None else [tensor for span in spans for _, tensor in span])
        for entry in entries:
            file.write(
                bytes(entry.end - entry.start) if entry.tensor is None else _content(entry, next(given))
            )
    return [Placed(e.name, e.tensor, len(header) + e.start) for e in entries if e.tensor is not None]


def _header(entries: Sequence[_Entry]) -> bytes:
    """Length and JSON, with spaces up to the next page."""
    rows = {e.name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.start, e.end]} for e in entries}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _content(entry: _Entry, given: Tensor) -> memoryview:
    content: memoryview = given.detach().contiguous().numpy().reshape(-1).view(np.uint8).data
    if (_DTYPES[str(given.dtype)], [*given.shape]) != (entry.dtype, entry.shape):
        raise ExportError(
            f"{entry.name}: {given.dtype} {[*given.shape]} where {entry.dtype} {entry.shape} has its place"
        )
    return content


def _layout(spans: Sequence[Sequence[tuple[str, Tensor]]]) -> Iterator[_Entry]:
    position = fillers = 0
    for span in spans:
        for i, (name, tensor) in enumerate(span):
            gap = -position % (ALIGNMENT_BYTES if i else PAGE_BYTES)
            if gap:
                yield _Entry(f"_fill.{fillers}", "U8", [gap], position, position + gap)
                position, fillers = position + gap, fillers + 1
            end = position + tensor.numel() * tensor.element_size()
            yield _Entry(name, _DTYPES[str(tensor.dtype)], list(tensor.shape), position, end, tensor)
            position = end
