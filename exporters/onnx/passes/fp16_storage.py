"""Frozen tensors come in as fp16 and are cast where they are used; arithmetic stays fp32."""

from collections.abc import Collection

import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import FLOAT, describe, like


def fp16_storage(graph: ir.Graph, weights: Collection[ir.Value]) -> None:
    """Make the inputs ``weights`` fp16. Of a table only the rows looked up are cast."""
    for weight in weights:
        uses = list(weight.uses())
        lookups = [node for node, place in uses if node.op_type == "Gather" and place == 0]
        others = [(node, place) for node, place in uses if node not in lookups]
        describe(weight, ir.DataType.FLOAT16, weight.shape)
        for node in lookups:
            _cast_rows(graph, node)
        if others:
            _cast_whole(graph, weight, others)


def _cast_rows(graph: ir.Graph, lookup: ir.Node) -> None:
    rows = lookup.outputs[0]
    cast = ir.node("Cast", [rows], {"to": int(FLOAT)})
    like(cast.outputs[0], rows)
    rows.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
    name = rows.name
    rows.name = f"{name}_half"
    cast.outputs[0].name = name
    cast.replace_input_with(0, rows)
    describe(rows, ir.DataType.FLOAT16, rows.shape)
    graph.insert_after(lookup, cast)


def _cast_whole(graph: ir.Graph, weight: ir.Value, uses: list[tuple[ir.Node, int]]) -> None:
    cast = ir.node("Cast", [weight], {"to": int(FLOAT)})
    describe(cast.outputs[0], FLOAT, weight.shape)
    graph.insert_before(graph[0], cast)
    for node, place in uses:
        node.replace_input_with(place, cast.outputs[0])
