"""What a frozen tensor becomes in the weights file: fp16, or int8 with one fp32 scale per output channel.

A weight slot of a section is named after its tensor; ``name:form`` is the slot of a form of it. Forms that end in ``t`` are
made of the transposed matrix, so that an int8 matrix always lies as (in, out), however the model keeps it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fleetune.device_runtime.errors import ExportError

FORMS = ("", "fp16", "int8", "int8t", "scale", "scalet")
"""Slot ``i`` of a section of ``n`` tensors has its form ``FORMS[k]`` in slot ``k * n + i``."""
LARGEST = 64
"""Of an int8 weight, because x86 without VNNI adds two products with a uint8 in 16 bits: 2 * 255 * 64 <= 32767 < 2 * 255 * 65.

The same products with uint8 weights are exact too, with all 8 bits, and twice as slow where there is VNNI (``docs/lab.md``).
"""


def with_forms(slots: Sequence[str]) -> list[str]:
    """The slots of a section and of every form of its tensors, in the order of FORMS."""
    return [f"{slot}:{form}" if form else slot for form in FORMS for slot in slots]


def split_form(slot: str) -> tuple[str, str]:
    """``name:form`` -> (name, form); the form of the tensor itself is empty."""
    name, _, form = slot.partition(":")
    return name, form


def derive(name: str, tensor: Tensor, form: str) -> Tensor:
    """The form of a tensor that goes into the weights file.

    Raises:
        ExportError: a value that the form cannot hold.
    """
    if not form:
        return tensor
    if not torch.isfinite(tensor).all():
        raise ExportError(f"{name}: holds values that are not finite, which {form} cannot store")
    return _DERIVED[form](name, tensor.detach())


@contextmanager
def rounded(tensors: Mapping[str, Tensor], slots: Iterable[str]) -> Iterator[None]:
    """For the duration, each tensor that one of ``slots`` stores in a form holds what that form keeps of it."""
    stored = dict(split_form(slot) for slot in slots if split_form(slot)[1] in _RESTORED)
    before = {name: tensors[name].detach().clone() for name in stored}
    with torch.no_grad():
        for name, form in stored.items():
            tensors[name].copy_(_RESTORED[form](name, before[name]))
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tensors[name].copy_(value)


def _half(name: str, tensor: Tensor) -> Tensor:
    found = tensor.half()
    if not torch.isfinite(found).all():
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


_DERIVED: dict[str, Callable[[str, Tensor], Tensor]] = {
    "fp16": _half,
    "int8": _int8,
    "int8t": lambda name, tensor: _int8(name, tensor.t()),
    "scale": _scale,
    "scalet": lambda name, tensor: _scale(name, tensor.t()),
}
_RESTORED: dict[str, Callable[[str, Tensor], Tensor]] = {
    "fp16": lambda name, tensor: _half(name, tensor).float(),
    "int8": _from_int8,
    "int8t": lambda name, tensor: _from_int8(name, tensor.t()).t(),
}
