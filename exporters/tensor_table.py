"""The tensors that slots name, each once however often it is tied: two weight files and the manifest's tensor table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save
from torch import Tensor

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts import manifest
from fleetune.device_runtime.contracts.artifact import ADAPTER, BASE
from fleetune.exporters.model.mapped import one_by_one
from fleetune.exporters.model.program import Program, tensors_of, trainable_names
from fleetune.exporters.model.quantize import derive, split_form
from fleetune.exporters.weights_file import write_base

OUTSIDE = -1
"""The layer of a tensor that no block reads first."""


class Slots(NamedTuple):
    """Weight slots outside the blocks and of each layer, in order: ``name`` in the module, or ``name:form``."""

    prelude: Sequence[str]
    layers: Sequence[Sequence[str]]
    head: Sequence[str]


@dataclass(frozen=True)
class TensorTable:
    """What was written. ``stored`` are the slots that have a tensor of their own, under its first name in the module."""

    rows: tuple[manifest.Tensor, ...]
    stored: tuple[str, ...]
    _row_of: Mapping[str, int]

    def indices(self, slots: Sequence[str]) -> tuple[int, ...]:
        """The row of each slot's tensor."""
        return tuple(self._row_of[slot] for slot in slots)


def write_tensors(folder: Path, program: Program, slots: Slots) -> TensorTable:
    """Write ``base.safetensors`` and ``adapter.safetensors`` into ``folder``; one row per tensor that some slot names.

    Raises:
        ExportError: a value that its form cannot hold, or a dtype that devices do not read.
    """
    own = _own_slots(program, [*slots.prelude, *(s for layer in slots.layers for s in layer), *slots.head])
    layer_of = _first_readers(slots, own)
    names = {slot: _table_name(program, slot) for slot in layer_of}
    rows = (
        *_write_frozen(folder, program, layer_of, names),
        *_write_trained(folder, program, layer_of, names),
    )
    index = {row.name: i for i, row in enumerate(rows)}
    return TensorTable(rows, tuple(layer_of), {slot: index[names[first]] for slot, first in own.items()})


def _own_slots(program: Program, slots: Sequence[str]) -> dict[str, str]:
    """Each slot -> the slot under the first name of its tensor, so that what is tied is one."""
    first = {id(tensor): name for name, tensor in reversed(tensors_of(program.module).items())}
    owners = {name: first[id(tensor)] for name, tensor in _all_tensors(program)}
    return {slot: _joined(owners[name], form) for slot in slots for name, form in [split_form(slot)]}


def _all_tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name that they have."""
    yield from program.module.named_parameters(remove_duplicate=False)
    yield from program.module.named_buffers(remove_duplicate=False)


def _first_readers(slots: Slots, own: Mapping[str, str]) -> dict[str, int]:
    """Own slots in the order of the file -> the layer that reads them first, or OUTSIDE."""
    found: dict[str, int] = {}
    for layer, names in ((OUTSIDE, slots.prelude), *enumerate(slots.layers), (OUTSIDE, slots.head)):
        for slot in names:
            found.setdefault(own[slot], layer)
    return found


def _table_name(program: Program, slot: str) -> str:
    name, form = split_form(slot)
    return _joined(program.names.get(name, name), form)


def _joined(name: str, form: str) -> str:
    return f"{name}:{form}" if form else name


def _write_frozen(
    folder: Path, program: Program, layer_of: Mapping[str, int], names: Mapping[str, str]
) -> Iterator[manifest.Tensor]:
    tensors, trained = tensors_of(program.module), set(trainable_names(program.module))
    layers = {names[slot]: layer for slot, layer in layer_of.items()}
    spans = [
        [slot for slot in span if slot not in trained]
        for _, span in groupby(layer_of, key=layer_of.__getitem__)
    ]

    def laid_out(slot: str) -> tuple[str, Tensor]:
        name, form = split_form(slot)
        return names[slot], derive(name, tensors[name].to("meta"), form)

    def contents() -> Iterator[Tensor]:
        slots = map(split_form, chain(*spans))
        for (name, form), tensor in one_by_one((slot, tensors[slot[0]]) for slot in slots):
            yield derive(name, tensor, form)

    layout = [[*map(laid_out, span)] for span in spans]
    for placed in write_base(folder / BASE, layout, contents=contents()):
        yield _row(placed.name, placed.tensor, placed.offset, layers[placed.name])


def _write_trained(
    folder: Path, program: Program, layer_of: Mapping[str, int], names: Mapping[str, str]
) -> Iterator[manifest.Tensor]:
    tensors, trained = tensors_of(program.module), set(trainable_names(program.module))
    learning = {
        names[n]: (tensors[n].detach().contiguous(), at) for n, at in layer_of.items() if n in trained
    }
    # save_file would make a file that only its owner may read, whatever the umask.
    write_atomically(folder / ADAPTER, save({name: tensor for name, (tensor, _) in learning.items()}))
    offsets = _offsets(folder / ADAPTER)
    for name, (tensor, layer) in learning.items():
        yield _row(name, tensor, offsets[name], layer, trainable=True)


def _row(name: str, tensor: Tensor, offset: int, layer: int, *, trainable: bool = False) -> manifest.Tensor:
    return manifest.Tensor(
        name,
        "adapter" if trainable else "base",
        str(tensor.dtype).removeprefix("torch."),
        tuple(tensor.shape),
        offset,
        layer,
        trainable,
    )


def _offsets(path: Path) -> dict[str, int]:
    """Byte of a safetensors file at which each tensor starts."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return {n: 8 + length + row["data_offsets"][0] for n, row in header.items() if n != "__metadata__"}
