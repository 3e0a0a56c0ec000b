"""Whether a manifest's tables fit each other: what its types alone do not say, checked before a weight is read."""

import math
from collections.abc import Iterable, Iterator

from fleetune.device_runtime.contracts.manifest import Graph, Input, Kind, Manifest, Port, Section, Tensor

DTYPES = frozenset(
    {"bool", "int8", "uint8", "int16", "int32", "int64", "uint64", "float16", "float32", "float64"}
)
"""Of tensors, inputs and ports, by numpy's names."""
_ELEMENTS_MAX = 2**48
_PAD_MAX = 2**31
_WHOLE_MODELS = "ort-training"
"""The one backend whose sections have no graphs of their own."""


def table_problems(manifest: Manifest, *, base_bytes: int) -> Iterator[str]:
    """Yield everything that leads nowhere: indices outside a table, unknown dtypes, tensors beyond their file.

    Args:
        manifest: as it was decoded.
        base_bytes: size of the file of frozen weights.
    """
    yield from _input_problems(manifest.inputs)
    for tensor in manifest.tensors:
        yield from _tensor_problems(tensor, base_bytes)
    for where, tensors in _slots(manifest):
        if any(not 0 <= i < len(manifest.tensors) for i in tensors):
            yield f"{where}: a tensor index outside the table of {len(manifest.tensors)}"
    yield from _layer_problems(manifest)
    yield from _graph_problems(manifest)


def _input_problems(inputs: tuple[Input, ...]) -> Iterator[str]:
    if [row.role for row in inputs].count("labels") != 1:
        yield "inputs: expected one whose role is labels"
    if all(row.shape[:1] != ("batch",) for row in inputs):
        yield "inputs: none has a row for each sample"
    for row in inputs:
        if row.dtype not in DTYPES:
            yield f"input {row.name}: no dtype {row.dtype!r}"
        if abs(row.pad) > _PAD_MAX or row.below < 0:
            yield f"input {row.name}: pad {row.pad:g} or limit {row.below} out of range"


def _tensor_problems(tensor: Tensor, base_bytes: int) -> Iterator[str]:
    if tensor.dtype not in DTYPES:
        yield f"{tensor.name}: no dtype {tensor.dtype!r}"
    elif min(tensor.shape, default=1) < 0 or tensor.offset < 0:
        yield f"{tensor.name}: negative shape or offset"
    elif math.prod(max(1, extent) for extent in tensor.shape) > _ELEMENTS_MAX:
        yield f"{tensor.name}: {list(tensor.shape)} ends beyond base.safetensors ({base_bytes} bytes)"
    elif tensor.file == "base" and tensor.offset + tensor.size_bytes > base_bytes:
        yield f"{tensor.name}: ends beyond base.safetensors ({base_bytes} bytes)"


def _slots(manifest: Manifest) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "prelude", manifest.prelude.tensors
    yield "head", manifest.head.tensors
    for i, layer in enumerate(manifest.layers):
        yield f"layer {i}", layer.tensors


def _layer_problems(manifest: Manifest) -> Iterator[str]:
    for i, layer in enumerate(manifest.layers):
        if not 0 <= layer.kind < len(manifest.kinds):
            yield f"layer {i}: kind {layer.kind} of {len(manifest.kinds)}"
            continue
        kind = manifest.kinds[layer.kind]
        if (used := _slots_used(kind)) > len(layer.tensors):
            yield f"layer {i}: {len(layer.tensors)} tensors, its graphs take {used}"
        if (used := _slots_used(kind, ("side",))) > len(layer.sides):
            yield f"layer {i}: {len(layer.sides)} sides, its graphs take {used}"
    yield from _side_problems(manifest)


def _side_problems(manifest: Manifest) -> Iterator[str]:
    """Of what flows beside the hidden stream, from the prelude to layers and head."""
    given = {p.index for g in manifest.prelude.graphs.values() for p in g.outputs if p.role == "side"}
    used = [_slots_used(kind, ("side",)) for kind in manifest.kinds]
    known = [(i, layer) for i, layer in enumerate(manifest.layers) if 0 <= layer.kind < len(used)]
    taken = {f"layer {i}": set(layer.sides[: used[layer.kind]]) for i, layer in known}
    heads = manifest.head.graphs.values()
    taken["head"] = {p.index for graph in heads for p in graph.inputs if p.role == "side"}
    for where, sides in taken.items():
        if lost := sorted(sides - given):
            yield f"{where}: no side {lost[0]} comes out of the prelude"


def _graph_problems(manifest: Manifest) -> Iterator[str]:
    for where, section in (("prelude", manifest.prelude), ("head", manifest.head)):
        if (used := _slots_used(section)) > len(section.tensors):
            yield f"{where}: {len(section.tensors)} tensors, its graphs take {used}"
    parts: dict[str, Section | Kind] = {"prelude": manifest.prelude, "head": manifest.head}
    parts |= {f"kind {i}": kind for i, kind in enumerate(manifest.kinds)}
    for where, part in parts.items():
        if where != "head" and "forward" not in part.graphs and manifest.backend != _WHOLE_MODELS:
            yield f"{where}: no forward graph"
        for purpose, graph in part.graphs.items():
            yield from (
                f"{where}.{purpose}: {problem}" for problem in _port_problems(graph, len(manifest.inputs))
            )


def _port_problems(graph: Graph, num_inputs: int) -> Iterator[str]:
    for port in _ports(graph):
        if port.dtype not in DTYPES:
            yield f"{port.name}: no dtype {port.dtype!r}"
        if port.index < 0 or (port.role == "batch" and port.index >= num_inputs):
            yield f"{port.name}: index {port.index} leads nowhere"


def _slots_used(part: Section | Kind, roles: tuple[str, ...] = ("weight", "d_weight")) -> int:
    """One more than the highest slot that its graphs name."""
    ports = (port for graph in part.graphs.values() for port in _ports(graph))
    return max((port.index + 1 for port in ports if port.role in roles), default=0)


def _ports(graph: Graph) -> Iterable[Port]:
    return (*graph.inputs, *graph.outputs)
