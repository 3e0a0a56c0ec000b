"""Writes ``base.safetensors`` so that a device can map it: tensors on 64-byte borders, each block on pages of its own."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    "torch.bool": "BOOL",
}


@dataclass(frozen=True)
class Placed:
    """A tensor and the byte of the file at which it starts."""

    name: str
    tensor: Tensor
    offset: int


def write_base(path: Path, spans: Sequence[Sequence[tuple[str, Tensor]]]) -> list[Placed]:
    """Write each span (prelude, every block, head) as one contiguous run of pages; fillers are tensors named ``_fill.N``.

    safetensors allows no holes, so what alignment leaves over is a uint8 tensor that nobody reads.

    Raises:
        ExportError: tensors of a dtype that devices do not read (all named).
    """
    strange = [f"{n} is {t.dtype}" for span in spans for n, t in span if str(t.dtype) not in _DTYPES]
    if strange:
        raise ExportError(f"{', '.join(strange)}; a device reads {choices(_DTYPES)}")
    rows = list(_layout(spans))
    header = {
        name: {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        for name, dtype, shape, start, end, _ in rows
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    start_of_data = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, _, start, end, tensor in rows:
            file.write(
                bytes(end - start) if tensor is None else tensor.detach().contiguous().numpy().tobytes()
            )
    return [
        Placed(name, tensor, start_of_data + start)
        for name, _, _, start, _, tensor in rows
        if tensor is not None
    ]


Row = tuple[str, str, list[int], int, int, "Tensor | None"]


def _layout(spans: Sequence[Sequence[tuple[str, Tensor]]]) -> Iterator[Row]:
    position = fillers = 0
    for span in spans:
        for first, (name, tensor) in zip([True] + [False] * len(span), span, strict=False):
            gap = -position % (PAGE_BYTES if first else ALIGNMENT_BYTES)
            if gap:
                yield f"_fill.{fillers}", "U8", [gap], position, position + gap, None
                position, fillers = position + gap, fillers + 1
            size = tensor.numel() * tensor.element_size()
            yield name, _DTYPES[str(tensor.dtype)], list(tensor.shape), position, position + size, tensor
            position += size
