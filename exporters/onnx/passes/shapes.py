"""Sizes are asked of the earliest input that has them, so that no forward depends on what flows back, nor an answer on labels."""

import onnx_ir as ir


def early_shapes(model: ir.Model) -> bool:
    """Ask the first input that knows.

    1. ``Shape(x)`` of an input is that of the first input of the same shape: of ``hidden_0``, not of its gradient.
    2. ``Shape(x, start=i, end=i+1)`` of an input is that of the first input with this extent: of ``hidden_0``, not of the labels.
    """
    inputs = list(model.graph.inputs)
    asked = [node for node in model.graph if node.op_type == "Shape" and node.inputs[0] in inputs]
    changed = [_ask_same_shape(node, inputs) or _ask_same_extent(node, inputs) for node in asked]
    return any(changed)


def _ask_same_shape(node: ir.Node, inputs: list[ir.Value]) -> bool:
    value = node.inputs[0]
    first = next(other for other in inputs if other is value or (other.shape and other.shape == value.shape))
    if first is not value:
        node.replace_input_with(0, first)
    return first is not value


def _ask_same_extent(node: ir.Node, inputs: list[ir.Value]) -> bool:
    value, start = node.inputs[0], node.attributes.get_int("start", 0)
    if not value.shape or node.attributes.get_int("end", -1) != start + 1:
        return False
    extent = value.shape[start]
    first = next(other for other in inputs if extent in (other.shape or ()))
    if first is value:
        return False
    place = list(first.shape or ()).index(extent)
    node.replace_input_with(0, first)
    node.attributes.add(ir.AttrInt64("start", place))
    node.attributes.add(ir.AttrInt64("end", place + 1))
    return True
