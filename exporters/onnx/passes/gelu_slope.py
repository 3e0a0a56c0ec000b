"""The slope of GELU in fewer passes over memory, and its forward from what the slope needs anyway."""

import math

import numpy as np
import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import add_node, become, constant, factor_of, like, scalar

_HALVES = (ir.AttrFloat32("alpha", 0.5), ir.AttrFloat32("beta", 0.5))


def half_of_erf(model: ir.Model) -> bool:
    """Halve erf in one pass over memory: it never leaves [-1, 1], where HardSigmoid clips nothing.

    1. ``0.5 * (Erf(x) + 1)``, operands in any order, becomes HardSigmoid with slope and offset 0.5.
    """
    changed = False
    for node in list(model.graph):
        value, factor = factor_of(node) or (None, 0.0)
        inner = None if value is None else value.producer()
        if inner is None or inner.op_type != "Add" or not math.isclose(factor, 0.5):
            continue
        erf = [v for v in inner.inputs if v is not None and _made_by(v, "Erf")]
        if erf and any(scalar(v) == 1.0 for v in inner.inputs):
            become(node, "HardSigmoid", erf, attributes=_HALVES)
            changed = True
    return changed


def folded_gauss(model: ir.Model) -> bool:
    """Fold the factor of a Gaussian into its exponent.

    1. ``c * Exp(-0.5 * (x * x))`` with c > 0, where ``t = x / sqrt(2)`` is there for Erf, becomes ``Exp(log(c) - t * t)``.
    """
    changed = False
    for node in list(model.graph):
        value, factor = factor_of(node) or (None, 0.0)
        x = None if value is None or factor <= 0 else _gaussian_of(value)
        t = None if x is None else _over_root_two(x)
        if t is not None:
            square = like(add_node(node, "Mul", [t, t]).outputs[0], node.outputs[0])
            log = constant(model.graph, f"log_{factor:.9g}", np.array(math.log(factor), np.float32))
            difference = like(add_node(node, "Sub", [log, square]).outputs[0], node.outputs[0])
            become(node, "Exp", [difference])
            changed = True
    return changed


def gelu_from_slope(model: ir.Model) -> bool:
    """Make the forward from what the slope needs anyway: one erf less. Runs on a graph as it is delivered.

    1. Exact ``Gelu(x)``, where :func:`half_of_erf` has left ``h = 0.5 * (1 + erf(x / sqrt(2)))``, becomes ``x * h``.
    """
    found = [(node, half) for node in model.graph if (half := _half_for(node)) is not None]
    for node, half in found:
        become(node, "Mul", [node.inputs[0], half])
    model.graph.sort()
    return bool(found)


def _half_for(node: ir.Node) -> ir.Value | None:
    if node.op_type != "Gelu" or _is_approximate(node) or node.inputs[0] is None:
        return None
    t = _over_root_two(node.inputs[0])
    uses = [] if t is None else [use for erf in _erfs(t) for use in erf.uses()]
    return next((use.node.outputs[0] for use in uses if use.node.op_type == "HardSigmoid"), None)


def _is_approximate(node: ir.Node) -> bool:
    found = node.attributes.get("approximate")
    return found is not None and found.as_string() != "none"


def _gaussian_of(value: ir.Value) -> ir.Value | None:
    """``x`` if ``value`` is ``Exp(-0.5 * (x * x))`` and nobody else reads it."""
    exp = value.producer()
    if exp is None or exp.op_type != "Exp" or len(value.uses()) != 1 or exp.inputs[0] is None:
        return None
    halved = exp.inputs[0].producer()
    square, factor = (None, 0.0) if halved is None else factor_of(halved) or (None, 0.0)
    product = None if square is None else square.producer()
    if product is None or product.op_type != "Mul" or not math.isclose(factor, -0.5):
        return None
    x, again = product.inputs
    return x if x is again else None


def _over_root_two(x: ir.Value) -> ir.Value | None:
    for node, _ in x.uses():
        found = factor_of(node)
        if found and math.isclose(found[1], math.sqrt(0.5), rel_tol=1e-6):
            return node.outputs[0]
    return None


def _erfs(t: ir.Value) -> list[ir.Value]:
    return [use.node.outputs[0] for use in t.uses() if use.node.op_type == "Erf"]


def _made_by(value: ir.Value, op: str) -> bool:
    node = value.producer()
    return node is not None and node.op_type == op
