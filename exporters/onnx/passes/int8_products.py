"""Matrix products with frozen matrices become int8 products; the one pass here that is not exact.

Forward: ``x @ W + b`` multiplies x, quantised to uint8 with one scale for the tensor, with the int8 matrix as it lies in the
file, (in, out). Backward: ``dy @ W.T`` uses the same matrix transposed. Its scales belong to what is summed over there, so they
go into dy; then each row of dy is brought to the same largest value, as the gradients of tokens differ by orders of magnitude
and share one uint8 scale.

Exact in their integers on every processor as long as no weight is beyond ``quantize.LARGEST``.
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import (
    CONTRIB,
    FLOAT,
    add_contrib,
    add_node,
    become,
    constant,
    describe,
    graph_of,
    like,
)

_TINY = np.array(1e-30, np.float32)


class Stored(NamedTuple):
    """A matrix that is int8 now: its old value, the two that replace it, and whether they lie transposed to it."""

    weight: ir.Value
    matrix: ir.Value
    scale: ir.Value
    transposed: bool


class Product(NamedTuple):
    """A product with a matrix on its right."""

    node: ir.Node
    transposed: bool  # whether the matrix enters transposed


def int8_products(graph: ir.Graph, weights: Collection[ir.Value]) -> list[Stored]:
    """Replace every product with one of ``weights``; a matrix that anything else reads as well stays as it is.

    The inputs that take its place, ``NAME_int8`` and ``NAME_scale``, are added to the graph's.
    """
    late = _dependents(graph)
    return [done for weight in weights if (done := _store(graph, weight, late))]


def _store(graph: ir.Graph, weight: ir.Value, late: Collection[ir.Node]) -> Stored | None:
    found = products_of(weight, graph)
    if weight.shape is None or len(weight.shape) != 2 or not found:
        return None
    forward = [p for p in found if p.node not in late]
    backward = [p for p in found if p.node in late]
    ways = {p.transposed for p in forward} | {not p.transposed for p in backward}
    if len(ways) != 1 or not forward:
        return None
    transposed = ways.pop()
    shape = list(weight.shape)[:: -1 if transposed else 1]
    matrix = describe(ir.Value(name=f"{weight.name}_int8"), ir.DataType.INT8, shape)
    scale = describe(ir.Value(name=f"{weight.name}_scale"), FLOAT, shape[1:])
    graph.inputs.extend([matrix, scale])
    for product in forward:
        _forward(product.node, matrix, scale)
    for product in backward:
        _backward(product.node, matrix, scale)
    return Stored(weight, matrix, scale, transposed)


def _forward(node: ir.Node, matrix: ir.Value, scale: ir.Value) -> None:
    x = node.inputs[0]
    q, x_scale, x_zero = _quantised(node, x)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    inputs = [q, matrix, x_scale, scale, x_zero, None, bias]
    become(node, "MatMulIntegerToFloat", inputs if bias is not None else inputs[:5], domain=CONTRIB)


def _backward(node: ir.Node, matrix: ir.Value, scale: ir.Value) -> None:
    dy, graph = node.inputs[0], matrix.graph
    scaled = like(add_node(node, "Mul", [dy, scale]).outputs[0], dy)
    even, largest = _evened(node, scaled)
    q, q_scale, zero = _quantised(node, even)
    flipped = describe(
        add_node(node, "Transpose", [matrix], perm=[1, 0]).outputs[0],
        ir.DataType.INT8,
        list(matrix.shape)[::-1],
    )
    one = constant(graph, "one", np.array(1, np.float32))
    product = add_contrib(node, "MatMulIntegerToFloat", [q, flipped, q_scale, one, zero])
    become(node, "Mul", [like(product.outputs[0], node.outputs[0]), largest])


def _evened(before: ir.Node, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Rows divided by their largest magnitude, and those magnitudes, (..., 1)."""
    graph = before.graph
    axis = constant(graph, "last_axis", np.array([-1], np.int64))
    row = None if x.shape is None else [*list(x.shape)[:-1], 1]
    magnitudes = like(add_node(before, "Abs", [x]).outputs[0], x)
    largest = describe(add_node(before, "ReduceMax", [magnitudes, axis], keepdims=1).outputs[0], FLOAT, row)
    held = describe(add_node(before, "Max", [largest, constant(graph, "tiny", _TINY)]).outputs[0], FLOAT, row)
    return like(add_node(before, "Div", [x, held]).outputs[0], x), held


def _quantised(before: ir.Node, x: ir.Value) -> Sequence[ir.Value]:
    """Values, scale and zero point of ``x`` as uint8; what is made twice is found by the duplicates' pass."""
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    graph_of(before).insert_before(before, node)
    q, scale, zero = node.outputs
    describe(q, ir.DataType.UINT8, x.shape)
    describe(scale, FLOAT, [])
    describe(zero, ir.DataType.UINT8, [])
    return q, scale, zero


def products_of(value: ir.Value, graph: ir.Graph, transposed: bool = False) -> list[Product]:
    """Products that read ``value`` as their right operand, through transposes or not; none if anything else reads it."""
    found: list[Product] = []
    for node, place in value.uses():
        if node.graph is graph and node.op_type == "Transpose" and _swaps(node):
            more = products_of(node.outputs[0], graph, not transposed)
        elif node.graph is graph and place == 1 and _is_plain_product(node):
            more = [Product(node, transposed != bool(_attribute(node, "transB", 0)))]
        else:
            more = []
        if not more:
            return []
        found += more
    return [] if value.is_graph_output() else found


def _swaps(node: ir.Node) -> bool:
    perm = node.attributes.get("perm")
    return perm is None or list(perm.as_ints()) == [1, 0]


def _is_plain_product(node: ir.Node) -> bool:
    if node.op_type == "MatMul":
        return True
    if node.op_type != "Gemm" or _attribute(node, "transA", 0):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    plain_bias = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    return plain_bias and _attribute(node, "alpha", 1.0) == 1 and _attribute(node, "beta", 1.0) == 1


def _attribute(node: ir.Node, name: str, default: float) -> float:
    found = node.attributes.get(name)
    return default if found is None else float(found.value)


def _dependents(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on the gradient that flows in."""
    reached = {v for v in graph.inputs if (v.name or "").startswith("d_hidden_")}
    nodes: set[ir.Node] = set()
    for node in graph:
        if any(v in reached for v in node.inputs):
            nodes.add(node)
            reached.update(node.outputs)
    return nodes
