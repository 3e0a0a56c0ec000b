"""Shapes asked of a gradient are asked of its value instead, so that no forward depends on what flows back."""

import onnx_ir as ir


def gradient_shapes(model: ir.Model) -> bool:
    """Ask the forward for shapes.

    1. ``Shape(d_hidden_0)`` becomes ``Shape(hidden_0)``: the two inputs have one shape.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    hidden, gradient = inputs.get("hidden_0"), inputs.get("d_hidden_0")
    if hidden is None or gradient is None:
        return False
    asked = [use.node for use in gradient.uses() if use.node.op_type == "Shape"]
    for node in asked:
        node.replace_input_with(0, hidden)
    return bool(asked)
