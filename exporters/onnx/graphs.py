"""A traced section as ONNX graphs: converted once, simplified by the passes, then cut into what the device runs."""

import re
from collections.abc import Sequence

import onnx
import onnx_ir as ir
import torch

from fleetune.device_runtime.contracts.manifest import Port, Role
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.graph_file import Converters, GraphFile, GraphFiles
from fleetune.exporters.model.quantize import FORMS
from fleetune.exporters.model.sections import SectionFunction
from fleetune.exporters.model.tracing import SIZES, fixed_size, quiet, trace
from fleetune.exporters.onnx.partition import saved_values
from fleetune.exporters.onnx.passes import apply, fuse, simplify, store
from fleetune.exporters.onnx.passes.frozen import forms_of, mark_frozen

OPSET = 20
_SYMBOL = re.compile(r"[A-Za-z_]\w*")

Named = dict[str, tuple[Role, int]]
NOMINAL = {"batch": 16, "seq": 64}
"""Sizes at which saved activations are weighed against each other."""


def prelude_graphs(
    section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32"
) -> GraphFiles:
    """``forward``: batch -> hidden and sides."""
    model, roles = _stored(section, sizes=sizes, base_dtype=base_dtype, outside=True)
    return {"forward": _extract(model.graph, list(model.graph.inputs), list(model.graph.outputs), roles)}


def head_graphs(section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32") -> GraphFiles:
    """``train``: everything; ``predict``: logits alone, from whatever they ask for."""
    model, roles = _stored(section, sizes=sizes, base_dtype=base_dtype, outside=True)
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    logits = [o for o in outputs if roles[_name(o)][0] == "logits"]
    return {
        "train": _extract(model.graph, inputs, outputs, roles),
        "predict": _extract(model.graph, inputs, logits, roles),
    }


def block_graphs(section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32") -> GraphFiles:
    """The joint graph cut into what a device runs.

    ``forward``, ``forward_save``, ``backward`` (from what was saved) and ``backward_recompute`` (from the block's input); for
    the lowest trained layer ``backward_lowest`` and ``backward_lowest_recompute``, which make no gradient of the input. A block
    with nothing to train is never that layer, and has neither.
    """
    model, roles = _stored(section, sizes=sizes, base_dtype=base_dtype)
    graph, inputs, outputs = model.graph, list(model.graph.inputs), list(model.graph.outputs)
    y = [o for o in outputs if roles[_name(o)][0] == "hidden"]
    gradients = [o for o in outputs if roles[_name(o)][0] != "hidden"]
    own = [o for o in gradients if roles[_name(o)][0] == "d_weight"]
    saved = saved_values(graph, roles, sizes=NOMINAL)
    every = {**roles, **{_name(v): ("saved", i) for i, v in enumerate(saved)}}
    found = {
        "forward": _extract(graph, inputs, y, roles),
        "forward_save": _extract(graph, inputs, [*y, *saved], every),
        "backward": _extract(graph, [*inputs, *saved], gradients, every),
        "backward_recompute": _extract(graph, inputs, gradients, roles),
    }
    if own:
        found["backward_lowest"] = _extract(graph, [*inputs, *saved], own, every)
        found["backward_lowest_recompute"] = _extract(graph, inputs, own, roles)
    return found


def step_graph(section: SectionFunction, *, sizes: Sequence[int], base_dtype: str = "fp32") -> GraphFile:
    """Convert a prelude or block of new tokens: everything that goes in, everything that comes out."""
    is_block = any(argument.role == "hidden" for argument in section.arguments)
    model, roles = _stored(section, sizes=sizes, base_dtype=base_dtype, outside=not is_block)
    return _extract(model.graph, list(model.graph.inputs), list(model.graph.outputs), roles)


def convert(section: SectionFunction, *, sizes: Sequence[int]) -> tuple[ir.Model, Named]:
    """Trace, translate to ONNX and simplify; every input and output gets the name and role of the section's.

    Raises:
        ExportError: the operator that has no translation, by name.
    """
    examples = [a.example for a in section.arguments]
    data = [a.is_data for a in section.arguments]
    names = [a.role for a in section.arguments]
    exported = trace(section.function, examples, what=section.what, sizes=sizes, data=data, names=names)
    try:
        with quiet():
            program = torch.onnx.export(exported, dynamo=True, verbose=False, opset_version=OPSET)
    except torch.onnx.errors.OnnxExporterError as exc:
        raise ExportError(f"{section.what}: no ONNX translation: {_reason(exc)}") from exc
    if program is None or len(program.model.graph.outputs) != len(section.results):
        raise ExportError(
            f"{section.what}: the ONNX exporter dropped outputs (expected {len(section.results)})"
        )
    model = program.model
    _name_dimensions(model, section, sizes)
    roles = _name_inputs(model, section) | _name_outputs(model, section)
    simplify(model)
    return model, roles


def _stored(
    section: SectionFunction, *, sizes: Sequence[int], base_dtype: str, outside: bool = False
) -> tuple[ir.Model, Named]:
    """The section with its frozen weights in their storage, then with operators of onnxruntime's own."""
    model, roles = convert(section, sizes=sizes)
    mark_frozen(_frozen(model, roles, section))
    store(model, base_dtype, outside=outside)
    for name, (weight, form) in forms_of(model).items():
        roles[name] = _form_slot(form, roles[weight][1], section)
    fuse(model)
    _name_outputs(model, section)
    return model, roles


def _frozen(model: ir.Model, roles: Named, section: SectionFunction) -> list[ir.Value]:
    learning = {("d_weight", i) for i, slot in enumerate(section.slots) if slot in section.trained}
    learning |= {result for result in section.results if result[0] == "d_weight"}
    inputs = [v for v in model.graph.inputs if roles[_name(v)][0] == "weight" and v.uses()]
    return [
        v for v in inputs if v.dtype == ir.DataType.FLOAT and ("d_weight", roles[_name(v)][1]) not in learning
    ]


def _form_slot(form: str, index: int, section: SectionFunction) -> tuple[Role, int]:
    return "weight", FORMS.index(form) * len(section.slots) + index


def _name_inputs(model: ir.Model, section: SectionFunction) -> Named:
    roles: Named = {}
    for value, argument in zip(model.graph.inputs, section.arguments, strict=True):
        value.name = f"{argument.role}_{argument.index}"
        roles[value.name] = (argument.role, argument.index)
    return roles


def _name_outputs(model: ir.Model, section: SectionFunction) -> Named:
    """Name the outputs, each of which gets a value of its own; a pass that joins equal values may undo that."""
    names = {f"{role}_{index}_out": (role, index) for role, index in section.results}
    for i, name in enumerate(names):
        _own_output(model.graph, i, name)
    return names


def _name_dimensions(model: ir.Model, section: SectionFunction, sizes: Sequence[int]) -> None:
    """Call the dynamic dimensions batch, seq and so on; refuse a trace that fixed one of them."""
    symbols = _symbols(model, section, sizes)

    def rename(match: re.Match[str]) -> str:
        return symbols.get(match[0], match[0])

    values = {v for node in model.graph for v in node.outputs} | set(model.graph.inputs)
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) else _SYMBOL.sub(rename, str(d)) for d in value.shape]
            )


def _symbols(model: ir.Model, section: SectionFunction, sizes: Sequence[int]) -> dict[str, str]:
    """Symbol -> ``batch``, ``seq`` or another of ``SIZES``."""
    names = dict(zip(sizes, SIZES, strict=False))
    symbols: dict[str, str] = {}
    for value, argument in zip(model.graph.inputs, section.arguments, strict=True):
        for traced, extent in zip(value.shape or (), argument.example.shape, strict=True):
            if not argument.is_data or extent not in names:
                continue
            if str(traced).isdigit() and value.uses():
                raise fixed_size(section.what, names[extent], argument.role)
            symbols[str(traced)] = names[extent]
    return symbols


def _own_output(graph: ir.Graph, i: int, name: str) -> None:
    """Call output ``i`` so, a value of its own: no two outputs, and no input and output, are one."""
    value = graph.outputs[i]
    if value.producer() is None or list(graph.outputs).count(value) > 1:
        node = ir.node("Identity", [value])
        node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
        graph.append(node)
        graph.outputs[i] = node.outputs[0]
    graph.outputs[i].name = name


def _extract(whole: ir.Graph, inputs: list[ir.Value], outputs: list[ir.Value], roles: Named) -> GraphFile:
    graph = ir.convenience.extract(whole, inputs, outputs)
    used = [v for v in graph.inputs if v.uses() or v in graph.outputs]
    graph.inputs[:] = used
    model = ir.Model(graph, ir_version=10, producer_name="fleetune")
    apply("gelu_from_slope", model)
    _forget_inner_shapes(graph)
    _sort_initializers(graph)
    proto = ir.serde.serialize_model(model)
    onnx.checker.check_model(proto)
    return GraphFile(
        proto.SerializeToString(deterministic=True),
        tuple(_port(v, roles) for v in graph.inputs),
        tuple(_port(v, roles) for v in graph.outputs),
    )


def _forget_inner_shapes(graph: ir.Graph) -> None:
    """Leave inner shapes to onnxruntime: it reuses buffers by annotated symbols, and traced ones are not always right."""
    declared = {*graph.inputs, *graph.outputs}
    for node in graph:
        for value in node.outputs:
            if value not in declared:
                value.shape = value.type = None


def _sort_initializers(graph: ir.Graph) -> None:
    """The extraction leaves them in an order that changes from process to process, and with it the artifact's digest."""
    ordered = sorted(graph.initializers.items())
    graph.initializers.clear()
    graph.initializers.update(ordered)


def _port(value: ir.Value, roles: Named) -> Port:
    role, index = roles[_name(value)]
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    shape = tuple(d if isinstance(d, int) else str(d) for d in (value.shape or ()))
    return Port(name=_name(value), role=role, dtype=dtype, shape=shape, index=index)


def _name(value: ir.Value) -> str:
    return str(value.name)


def _reason(exc: BaseException) -> str:
    root = exc
    while root.__cause__ is not None:
        root = root.__cause__
    return (str(root).strip().splitlines() or [type(root).__name__])[0]


CONVERTERS = Converters(prelude_graphs, block_graphs, head_graphs, ".onnx", step_graph)
