"""What a frozen tensor becomes in the weights file: fp16, int8 with one fp32 scale per output channel or row, or 4 bits.

A weight slot of a section is named after its tensor; ``name:form`` is the slot of a form of it. Forms that end in ``t`` are
made of the transposed matrix, so that an int8 matrix of a product always lies as (in, out), however the model keeps it. ``rows``
and ``int4`` lie as the model keeps them: they are made fp32 again where they are read.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.mapped import leave, mapped_files

FORMS = ("", "fp16", "int8", "int8t", "scale", "scalet", "rows", "rowscale", "int4", "int4scale")
"""Slot ``i`` of a section of ``n`` tensors has its form ``FORMS[k]`` in slot ``k * n + i``."""
LARGEST = 64
"""Of an int8 weight, because x86 without VNNI adds two products with a uint8 in 16 bits: 2 * 255 * 64 <= 32767 < 2 * 255 * 65.

The same products with uint8 weights are exact too, with all 8 bits, and twice as slow where there is VNNI (``docs/lab.md``).
"""

LARGEST_OF_ROWS = 127
"""Of an int8 weight that no int8 product reads."""
GROUP = 32
"""Weights of a row that share one scale of 4-bit storage."""
_ZERO = 8
"""The nibble that stands for zero."""
_AT_ONCE = 2**21
"""Weights that are rounded at a time."""


def with_forms(slots: Sequence[str]) -> list[str]:
    """The slots of a section and of every form of its tensors, in the order of FORMS."""
    return [f"{slot}:{form}" if form else slot for form in FORMS for slot in slots]


def split_form(slot: str) -> tuple[str, str]:
    """``name:form`` -> (name, form); the form of the tensor itself is empty."""
    name, _, form = slot.partition(":")
    return name, form


def derive(name: str, tensor: Tensor, form: str) -> Tensor:
    """The form of a tensor that goes into the weights file; of one on the device ``meta`` its dtype and shape alone.

    Raises:
        ExportError: a value that the form cannot hold.
    """
    if not form:
        return tensor
    if not tensor.is_meta and not is_finite(tensor):
        raise ExportError(f"{name}: holds values that are not finite, which {form} cannot store")
    return _DERIVED[form](name, tensor.detach())


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds neither NaN nor infinity; takes no memory, where ``isfinite`` takes more than the tensor does."""
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.detach().aminmax())


@contextmanager
def rounded(
    tensors: Mapping[str, Tensor], slots: Iterable[str], *, aside: Path | None = None
) -> Iterator[None]:
    """For the duration, each tensor that one of ``slots`` stores in a form holds what that form keeps of it.

    That lies in a nameless file, in the folder ``aside`` if one is given, and is mapped: of it no more is in memory than is
    read. What the tensor held before stays where it is, and is the tensor's again afterwards.
    """
    forms = {name: form for name, form in map(split_form, slots) if form in _RESTORED}
    before = {name: tensors[name].data for name in forms}
    with TemporaryFile(dir=aside) as file:
        try:
            for name, values in _rounded_aside(file, before, forms).items():
                tensors[name].data = values
            with torch.enable_grad():
                yield
        finally:
            for name, values in before.items():
                tensors[name].data = values


def _rounded_aside(
    file: IO[bytes], tensors: Mapping[str, Tensor], forms: Mapping[str, str]
) -> dict[str, Tensor]:
    """Write what the forms keep, each tensor on pages of its own, and map it."""
    files, starts = mapped_files(), {}
    for name, form in forms.items():
        starts[name] = file.seek(-(-file.tell() // mmap.PAGESIZE) * mmap.PAGESIZE)
        tensor = tensors[name]
        for part in _parts(tensor) if form in _BY_ROWS else [tensor]:
            file.write(_RESTORED[form](name, part).to(tensor.dtype).contiguous().numpy().data)
        leave([tensor], files)
    file.flush()
    content = mmap.mmap(file.fileno(), 0) if file.tell() else b""
    return {
        name: torch.frombuffer(
            content, dtype=tensors[name].dtype, count=tensors[name].numel(), offset=start
        ).reshape(tensors[name].shape)
        for name, start in starts.items()
    }


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Rows of a tensor, _AT_ONCE values at a time."""
    rows = max(1, _AT_ONCE * len(tensor) // max(1, tensor.numel())) if tensor.ndim else 1
    yield from (tensor[at : at + rows] for at in range(0, len(tensor), rows)) if tensor.ndim else [tensor]


def _half(name: str, tensor: Tensor) -> Tensor:
    found = tensor.half()
    if not found.is_meta and not torch.isfinite(found).all():
        raise ExportError(f"{name}: holds {tensor.abs().max():.3g}, beyond the largest fp16 of 65504")
    return found


def _scale(_: str, matrix: Tensor) -> Tensor:
    """(in, out) -> (out,): the step of each column; a column of zeros gets 1."""
    largest = matrix.abs().amax(0)
    return torch.where(largest > 0, largest / LARGEST, 1.0)


def _int8(name: str, matrix: Tensor) -> Tensor:
    steps = (matrix / _scale(name, matrix)).round().clamp(-LARGEST, LARGEST)
    return steps.to(torch.int8).contiguous()


def _from_int8(name: str, matrix: Tensor) -> Tensor:
    return _int8(name, matrix) * _scale(name, matrix)


def _rowscale(_: str, matrix: Tensor) -> Tensor:
    """(N, K) -> (N,): the step of each row; a row of zeros gets 1."""
    largest = matrix.abs().amax(1)
    return torch.where(largest > 0, largest / LARGEST_OF_ROWS, 1.0)


def _rows(name: str, matrix: Tensor) -> Tensor:
    steps = (matrix / _rowscale(name, matrix)[:, None]).round()
    return steps.clamp(-LARGEST_OF_ROWS, LARGEST_OF_ROWS).to(torch.int8)


def _from_rows(name: str, matrix: Tensor) -> Tensor:
    return _rows(name, matrix) * _rowscale(name, matrix)[:, None]


def _groups(matrix: Tensor) -> Tensor:
    """(N, K) -> (N, K / GROUP, GROUP)."""
    return matrix.reshape(len(matrix), -1, GROUP)


def _int4scale(_: str, matrix: Tensor) -> Tensor:
    """(N, K) -> (N, K / GROUP, 1): what is furthest from zero in a group becomes -8 steps, so a step may be negative."""
    groups = _groups(matrix)
    furthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    return torch.where(furthest != 0, furthest / -_ZERO, 1.0)


def _nibbles(matrix: Tensor, steps: Tensor) -> Tensor:
    """(N, K), and each group's step -> (N, K / GROUP, GROUP): 0 to 15."""
    return ((_groups(matrix) / steps).round() + _ZERO).clamp(0, 2 * _ZERO - 1).to(torch.uint8)


def _int4(name: str, matrix: Tensor) -> Tensor:
    """(N, K) -> (N, K / GROUP, GROUP / 2): in byte i of a group its weight i below, and weight i + GROUP / 2 above."""
    nibbles = _nibbles(matrix, _int4scale(name, matrix))
    return nibbles[..., : GROUP // 2] | (nibbles[..., GROUP // 2 :] << 4)


def _from_int4(name: str, matrix: Tensor) -> Tensor:
    steps = _int4scale(name, matrix)
    return ((_nibbles(matrix, steps).float() - _ZERO) * steps).flatten(1)


def _some_rows(of: Callable[[str, Tensor], Tensor]) -> Callable[[str, Tensor], Tensor]:
    """``of`` a matrix, some rows at a time: what it makes on the way would take several times the memory of a large table."""

    def joined(name: str, matrix: Tensor) -> Tensor:
        like, rows = of(name, matrix.to("meta")), 0
        if matrix.is_meta:
            return like
        made = torch.empty_like(like, device=matrix.device)
        for part in _parts(matrix):
            made[rows : rows + len(part)] = of(name, part)
            rows += len(part)
        return made

    return joined


_DERIVED: dict[str, Callable[[str, Tensor], Tensor]] = {
    "fp16": _half,
    "int8": _int8,
    "int8t": lambda name, tensor: _int8(name, tensor.t()),
    "scale": _scale,
    "scalet": lambda name, tensor: _scale(name, tensor.t()),
    "rows": _some_rows(_rows),
    "rowscale": _some_rows(_rowscale),
    "int4": _some_rows(_int4),
    "int4scale": _some_rows(_int4scale),
}
_RESTORED: dict[str, Callable[[str, Tensor], Tensor]] = {
    "fp16": lambda name, tensor: _half(name, tensor).float(),
    "int8": _from_int8,
    "int8t": lambda name, tensor: _from_int8(name, tensor.t()).t(),
    "rows": _from_rows,
    "int4": _from_int4,
}
_BY_ROWS = ("fp16", "rows", "int4")
"""Forms in which no row depends on another."""
