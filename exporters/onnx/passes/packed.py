"""Frozen matrices come in packed, and are fp32 again only where and when they are read; the arithmetic stays fp32.

Of a table the rows looked up are unpacked. Of the matrix of a product at most ``UNPACKED_BYTES`` are there at a time: a larger
one goes through the product in pieces of its rows, which are columns of what comes out one way and of what goes in the other.
The two ways cut and unpack in different words, or whoever joins equal nodes would keep the matrix from the one to the other.
"""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fleetune.device_runtime.contracts.manifest import UNPACKED_BYTES
from fleetune.exporters.model.quantize import GROUP
from fleetune.exporters.onnx.passes.building import FLOAT, add_node, become, constant, describe, graph_of
from fleetune.exporters.onnx.passes.frozen import note_form
from fleetune.exporters.onnx.passes.int8_products import Product, products_of

_BYTE, _SIGNED = ir.DataType.UINT8, ir.DataType.INT8
_EXTENTS = tuple[int, int]
_TO_THE_END = int(np.iinfo(np.int64).max)


class Packed(NamedTuple):
    """The two inputs that stand for a matrix."""

    values: ir.Value
    scale: ir.Value


class Packing(NamedTuple):
    """A form of a matrix (N, K).

    ``whole(before, packed, (n, k), again=…)`` unpacks n rows, ``again`` in other words; ``some(before, packed, ids, k)`` those of
    looked-up rows, (…, k). ``tail`` is the shape of one row of values and of scales.
    """

    forms: tuple[str, str]
    dtype: ir.DataType
    tail: Callable[[int], tuple[list[int], list[int]]]
    fits: Callable[[int], bool]
    whole: Callable[..., ir.Value]
    some: Callable[[ir.Node, Packed, int], ir.Value]


def pack_tables(graph: ir.Graph, weights: Collection[ir.Value], packing: Packing) -> bool:
    """Pack every matrix that lookups of rows alone read."""
    found = [(w, lookups) for w in weights if _fits(w, packing) and (lookups := _lookups(w))]
    for weight, lookups in found:
        packed = _inputs(graph, weight, packing)
        for node in lookups:
            ids = node.inputs[1]
            rows = Packed(*(_gather(node, value, ids) for value in packed))
            _replace(node, packing.some(node, rows, _extents(weight)[1]))
    return bool(found)


def pack_matrices(graph: ir.Graph, weights: Collection[ir.Value], packing: Packing) -> bool:
    """Pack every matrix that products alone read."""
    found = [(w, products) for w in weights if _fits(w, packing) and (products := products_of(w, graph))]
    for weight, products in found:
        packed = _inputs(graph, weight, packing)
        for product in products:
            _multiply(product, packed, _extents(weight), packing)
    return bool(found)


def _fits(weight: ir.Value, packing: Packing) -> bool:
    shape = weight.shape
    if shape is None or len(shape) != 2 or weight.is_graph_output():
        return False
    return all(isinstance(extent, int) and extent for extent in shape) and packing.fits(_extents(weight)[1])


def _extents(weight: ir.Value) -> _EXTENTS:
    rows, width = (int(str(extent)) for extent in weight.shape or (0, 0))
    return rows, width


def _lookups(weight: ir.Value) -> list[ir.Node]:
    """Nodes that gather rows, if nothing else reads the weight."""
    uses = list(weight.uses())
    gathers = [
        n
        for n, place in uses
        if n.op_type == "Gather" and place == 0 and n.attributes.get_int("axis", 0) == 0
    ]
    return gathers if len(gathers) == len(uses) else []


def _inputs(graph: ir.Graph, weight: ir.Value, packing: Packing) -> Packed:
    rows, width = _extents(weight)
    values, scale = packing.tail(width)
    made = Packed(
        describe(ir.Value(name=f"{weight.name}_packed"), packing.dtype, [rows, *values]),
        describe(ir.Value(name=f"{weight.name}_steps"), FLOAT, [rows, *scale]),
    )
    graph.inputs.extend(made)
    for value, form in zip(made, packing.forms, strict=True):
        note_form(value, weight, form)
    return made


def _gather(before: ir.Node, table: ir.Value, ids: ir.Value | None) -> ir.Value:
    shape = (
        None if ids is None or ids.shape is None or table.shape is None else [*ids.shape, *table.shape[1:]]
    )
    return describe(add_node(before, "Gather", [table, ids], axis=0).outputs[0], table.dtype or FLOAT, shape)


def _multiply(product: Product, packed: Packed, extents: _EXTENTS, packing: Packing) -> None:
    """Give a product its unpacked matrix, or make it of pieces."""
    node, transposed = product
    rows, width = extents
    bounds = _bounds(rows, width)
    operands = []
    for start, end in bounds:
        part = (
            packed
            if len(bounds) == 1
            else Packed(*(_piece(node, value, (start, end), again=not transposed) for value in packed))
        )
        operands.append(packing.whole(node, part, (end - start, width), again=not transposed))
    x, out = node.inputs[0], node.outputs[0]
    parts = []
    for (start, end), operand in zip(bounds, operands, strict=True):
        given = x if transposed or len(bounds) == 1 else _piece(node, x, (start, end), axis=-1)
        right = _turned(node, operand) if transposed else operand
        shape = None if out.shape is None else [*out.shape[:-1], end - start if transposed else width]
        parts.append(describe(add_node(node, "MatMul", [given, right]).outputs[0], FLOAT, shape))
    whole = _joined(node, parts, out) if transposed else _summed(node, parts, out)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    _replace(
        node,
        whole
        if bias is None
        else describe(add_node(node, "Add", [whole, bias]).outputs[0], FLOAT, out.shape),
    )


def _bounds(rows: int, width: int) -> list[_EXTENTS]:
    """Rows of each piece: as many pieces as it takes, of equal size but for the last."""
    pieces = -(-rows * width * 4 // UNPACKED_BYTES)
    size = -(-rows // min(pieces, rows))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def _joined(before: ir.Node, parts: Sequence[ir.Value], out: ir.Value) -> ir.Value:
    if len(parts) == 1:
        return parts[0]
    return describe(add_node(before, "Concat", parts, axis=-1).outputs[0], FLOAT, out.shape)


def _summed(before: ir.Node, parts: Sequence[ir.Value], out: ir.Value) -> ir.Value:
    """One after the other, so that no two pieces are there at once."""
    total = parts[0]
    for part in parts[1:]:
        total = describe(add_node(before, "Add", [total, part]).outputs[0], FLOAT, out.shape)
    return total


def _piece(
    before: ir.Node, value: ir.Value | None, bounds: _EXTENTS, *, axis: int = 0, again: bool = False
) -> ir.Value:
    """From one place of an axis to another, ``again`` counted from its end.

    Of two axes or more a second is named, whole: slices of one alone that cover it onnxruntime makes one ``Split``, which copies
    all of a table at once and holds it to the last piece's use.
    """
    graph, (start, end) = graph_of(before), bounds
    shape = None if value is None or value.shape is None else list(value.shape)
    extent = 0 if shape is None else shape[axis]
    if again and isinstance(extent, int):
        start, end = start - extent, end - extent or _TO_THE_END
    cuts = [(start, end, axis)]
    if shape is not None and len(shape) > 1:
        cuts.append((0, _TO_THE_END, axis + 1 if axis >= 0 else axis - 1))
    words = [
        constant(graph, "at_" + "_".join(map(str, n)), np.array(n, np.int64)) for n in zip(*cuts, strict=True)
    ]
    if shape is not None:
        shape[axis] = bounds[1] - bounds[0]
    dtype = FLOAT if value is None else value.dtype or FLOAT
    return describe(add_node(before, "Slice", [value, *words]).outputs[0], dtype, shape)


def _turned(before: ir.Node, matrix: ir.Value) -> ir.Value:
    shape = None if matrix.shape is None else list(matrix.shape)[::-1]
    return describe(add_node(before, "Transpose", [matrix], perm=[1, 0]).outputs[0], FLOAT, shape)


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Let ``node`` only hand on ``value``, which the next tidying leaves out."""
    become(node, "Identity", [value])


def _reshaped(
    before: ir.Node, value: ir.Value, shape: Sequence[int], known: Sequence[int | str] | None = None
) -> ir.Value:
    name = "shape_" + "_".join(map(str, shape)).replace("-", "m")
    target = constant(graph_of(before), name, np.array(shape, np.int64))
    dtype = value.dtype or FLOAT
    return describe(add_node(before, "Reshape", [value, target]).outputs[0], dtype, known or shape)


def _dequantised(before: ir.Node, inputs: Sequence[ir.Value], shape: Sequence[int], axis: int) -> ir.Value:
    return describe(add_node(before, "DequantizeLinear", inputs, axis=axis).outputs[0], FLOAT, shape)


def _from_rows(before: ir.Node, packed: Packed, extents: _EXTENTS, *, again: bool) -> ir.Value:
    """(n, k) int8 and (n,) -> (n, k)."""
    if not again:
        return _dequantised(before, packed, extents, 0)
    values = _reshaped(before, packed.values, [1, *extents])
    return _reshaped(before, _dequantised(before, [values, packed.scale], [1, *extents], 1), extents)


def _some_from_rows(before: ir.Node, packed: Packed, width: int) -> ir.Value:
    """(…, k) int8 and (…,) -> (…, k)."""
    values, scale = packed
    last = constant(graph_of(before), "last_axis", np.array([-1], np.int64))
    steps = describe(add_node(before, "Cast", [values], to=int(FLOAT)).outputs[0], FLOAT, values.shape)
    shape = None if scale.shape is None else [*scale.shape, 1]
    scale = describe(add_node(before, "Unsqueeze", [scale, last]).outputs[0], FLOAT, shape)
    return describe(add_node(before, "Mul", [steps, scale]).outputs[0], FLOAT, values.shape)


def _nibbles(before: ir.Node, values: ir.Value) -> ir.Value:
    """(…, GROUP / 2) bytes -> (…, GROUP) from 0 to 15."""
    graph = graph_of(before)
    below, four = (constant(graph, f"byte_{n}", np.array(n, np.uint8)) for n in (15, 4))
    low = describe(add_node(before, "BitwiseAnd", [values, below]).outputs[0], _BYTE, values.shape)
    shift = ir.node("BitShift", [values, four], {"direction": "RIGHT"})
    graph.insert_before(before, shift)
    high = describe(shift.outputs[0], _BYTE, values.shape)
    shape = None if values.shape is None else [*values.shape[:-1], GROUP]
    return describe(add_node(before, "Concat", [low, high], axis=-1).outputs[0], _BYTE, shape)


def _from_int4(before: ir.Node, packed: Packed, extents: _EXTENTS, *, again: bool) -> ir.Value:
    """(n, k / GROUP, GROUP / 2) bytes and (n, k / GROUP, 1) -> (n, k)."""
    graph, count = graph_of(before), extents[0] * extents[1] // GROUP
    if again:
        values = _reshaped(before, _nibbles(before, packed.values), [count, GROUP])
    else:
        values = _nibbles(before, _reshaped(before, packed.values, [count, GROUP // 2]))
    scale = _reshaped(before, packed.scale, [count])
    eight = constant(graph, "byte_8s", np.array([8], np.uint8))
    size = constant(graph, f"at_{count}", np.array([count], np.int64))
    zero = describe(add_node(before, "Expand", [eight, size]).outputs[0], _BYTE, [count])
    return _reshaped(before, _dequantised(before, [values, scale, zero], [count, GROUP], 0), extents)


def _some_from_int4(before: ir.Node, packed: Packed, width: int) -> ir.Value:
    """(…, k / GROUP, GROUP / 2) bytes and (…, k / GROUP, 1) -> (…, k)."""
    nibbles = _nibbles(before, packed.values)
    eight = constant(graph_of(before), "eight", np.array(8, np.float32))
    steps = describe(add_node(before, "Cast", [nibbles], to=int(FLOAT)).outputs[0], FLOAT, nibbles.shape)
    signed = describe(add_node(before, "Sub", [steps, eight]).outputs[0], FLOAT, nibbles.shape)
    scaled = describe(add_node(before, "Mul", [signed, packed.scale]).outputs[0], FLOAT, nibbles.shape)
    around = list(nibbles.shape or ())[:-2]
    return _reshaped(before, scaled, [*(0 for _ in around), width], [*around, width])


ROWS = Packing(
    ("rows", "rowscale"), _SIGNED, lambda k: ([k], []), lambda k: True, _from_rows, _some_from_rows
)
INT4 = Packing(
    ("int4", "int4scale"),
    _BYTE,
    lambda k: ([k // GROUP, GROUP // 2], [k // GROUP, 1]),
    lambda k: k % GROUP == 0,
    _from_int4,
    _some_from_int4,
)
