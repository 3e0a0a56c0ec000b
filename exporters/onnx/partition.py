"""Cuts a joint forward/backward graph where the fewest bytes must be kept from the one to the other.

The backward may recompute cheap things (elementwise, reshapes, normalisation factors) from what was saved; a minimum cut over the
graph, capacities in bytes, decides what is saved (:mod:`fleetune.exporters.model.mincut`).
"""

import math
from collections.abc import Mapping

import onnx_ir as ir

from fleetune.device_runtime.contracts.manifest import Role, extent
from fleetune.exporters.model.mincut import FREE, NEVER, Candidate, cheapest

# What the backward may do again: operators that stream over memory once, and those that only rename a shape.
_CHEAP_NAMES = """
    Add Sub Mul Div Neg Sqrt Reciprocal Pow Abs Max Min Where Equal Less Greater And Or Not
    Reshape Transpose Unsqueeze Squeeze Expand Cast Identity Slice Concat Split Shape Gather Constant ConstantOfShape Range
    BitwiseAnd BitShift DequantizeLinear
"""
CHEAP = frozenset(_CHEAP_NAMES.split())


def saved_values(
    graph: ir.Graph, roles: Mapping[str, tuple[Role, int]], *, sizes: Mapping[str, int]
) -> list[ir.Value]:
    """The values of a joint graph that cost the fewest bytes to keep for the backward, in graph order.

    Args:
        graph: inputs hidden, d_hidden, side and weight; outputs hidden, d_hidden and d_weight.
        roles: role and index of each input and output by name.
        sizes: nominal extents of the symbolic dimensions, to weigh values in bytes.

    The hidden input and the sides cost nothing to keep: whoever chains the graphs holds them anyway.
    """
    late = _dependents(graph, [v for v in graph.inputs if roles[v.name or ""][0] == "d_hidden"])
    values = _early_values(graph, late)
    kept = set(cheapest([_candidate(value, late, sizes) for value in values]))
    given = {*graph.inputs, *graph.initializers.values(), *graph.outputs}
    return [value for value in values if value in kept and value not in given]


def _dependents(graph: ir.Graph, roots: list[ir.Value]) -> set[ir.Node]:
    """Nodes that depend on ``roots``."""
    reached: set[ir.Value] = set(roots)
    nodes: set[ir.Node] = set()
    for node in graph:
        if any(v in reached for v in node.inputs if v is not None):
            nodes.add(node)
            reached.update(node.outputs)
    return nodes


def _early_values(graph: ir.Graph, late: set[ir.Node]) -> list[ir.Value]:
    produced = [v for node in graph if node not in late for v in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *produced]


def _candidate(value: ir.Value, late: set[ir.Node], sizes: Mapping[str, int]) -> Candidate:
    node = value.producer()
    if node is None or node.op_type not in CHEAP:
        sources = None
    else:
        sources = tuple(v for v in node.inputs if v is not None)
    return Candidate(value, _kept_cost(value, sizes), sources, any(use.node in late for use in value.uses()))


def _kept_cost(value: ir.Value, sizes: Mapping[str, int]) -> float:
    if value.is_graph_input() or value.is_initializer():
        return FREE
    if value.is_graph_output():
        return FREE  # the block's own output is kept by whoever runs the next block
    if value.shape is None or value.dtype is None or value.dtype == ir.DataType.INT64:
        return NEVER  # shapes are made again, never carried
    count = math.prod(extent(str(e), batch=sizes["batch"], seq=sizes["seq"]) for e in value.shape)
    return float(count * value.dtype.itemsize) + FREE
