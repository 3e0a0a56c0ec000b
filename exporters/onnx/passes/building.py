"""New nodes whose outputs know their type and shape, as the cut between forward and backward wants it."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

CONTRIB = "com.microsoft"
FLOAT = ir.DataType.FLOAT


def add_node(
    before: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: int | float | Sequence[int]
) -> ir.Node:
    """Put a node in front of ``before``; its outputs take dtype and shape from :func:`describe`."""
    node = ir.node(op, inputs, attributes)
    graph_of(before).insert_before(before, node)
    return node


def add_contrib(before: ir.Node, op: str, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """The same for an operator of onnxruntime's own domain."""
    node = ir.node(op, inputs, domain=CONTRIB)
    graph_of(before).opset_imports[CONTRIB] = 1
    graph_of(before).insert_before(before, node)
    return node


def describe(value: ir.Value, dtype: ir.DataType, shape: ir.Shape | Sequence[int | str] | None) -> ir.Value:
    """Give ``value`` its type and shape, and return it."""
    value.type = ir.TensorType(dtype)
    value.shape = None if shape is None else ir.Shape(list(shape))
    return value


def like(value: ir.Value, model: ir.Value) -> ir.Value:
    """Give ``value`` the type and shape of ``model``, and return it."""
    return describe(value, model.dtype or FLOAT, model.shape)


def become(
    node: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    *,
    domain: str = "",
    attributes: Sequence[ir.Attr] = (),
) -> None:
    """Turn ``node`` into another operator that gives the same value."""
    node.op_type, node.domain = op, domain
    if domain:
        graph_of(node).opset_imports[domain] = 1
    node.attributes.clear()
    for attribute in attributes:
        node.attributes.add(attribute)
    node.resize_inputs(len(inputs))
    for place, value in enumerate(inputs):
        node.replace_input_with(place, value)


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initializer, made once per name."""
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        describe(graph.initializers[name], ir.tensor(array).dtype, array.shape)
    return graph.initializers[name]


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant float tensor of one element, else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype != FLOAT or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def factor_of(node: ir.Node) -> tuple[ir.Value, float] | None:
    """``x`` and ``c`` if ``node`` is ``Mul(x, c)`` with a constant number c."""
    if node.op_type != "Mul":
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number = scalar(other)
        if value is not None and number is not None:
            return value, number
    return None


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that holds ``node``."""
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        raise TypeError(f"{node.op_type} is in no graph")
    return graph
