"""Frozen weights in the form in which they are stored; arithmetic stays fp32, or is int8 where products are."""

import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import FLOAT, describe, like
from fleetune.exporters.onnx.passes.frozen import frozen_inputs, note_form
from fleetune.exporters.onnx.passes.int8_products import int8_products
from fleetune.exporters.onnx.passes.packed import INT4, ROWS, pack_matrices, pack_tables


def fp16_storage(model: ir.Model) -> bool:
    """Make the frozen inputs fp16.

    1. A table that ``Gather`` reads: the rows looked up are cast, not the table.
    2. Any other use: the tensor is cast once, in front of everything.
    """
    weights = frozen_inputs(model)
    for weight in weights:
        uses = list(weight.uses())
        lookups = [node for node, place in uses if node.op_type == "Gather" and place == 0]
        others = [(node, place) for node, place in uses if node not in lookups]
        describe(weight, ir.DataType.FLOAT16, weight.shape)
        note_form(weight, weight, "fp16")
        for node in lookups:
            _cast_rows(model.graph, node)
        if others:
            _cast_whole(model.graph, weight, others)
    return bool(weights)


def int8_storage(model: ir.Model) -> bool:
    """Make frozen matrices int8 with scales; norms, biases and whatever is no plain product stay as they are.

    1. ``x @ W``, and ``x @ W.T`` in a Gemm or behind a Transpose: a product with the int8 matrix.
    2. ``dy @ W.T`` of the same matrix in the backward: a product with it transposed.
    """
    found = int8_products(model.graph, frozen_inputs(model))
    for stored in found:
        turned = "t" * stored.transposed
        note_form(stored.matrix, stored.weight, f"int8{turned}")
        note_form(stored.scale, stored.weight, f"scale{turned}")
    return bool(found)


def row_tables(model: ir.Model) -> bool:
    """Make tables int8 with a scale for each row.

    1. A table that ``Gather`` alone reads: the rows looked up become fp32.
    """
    return pack_tables(model.graph, frozen_inputs(model), ROWS)


def row_matrices(model: ir.Model) -> bool:
    """Make matrices of products int8 with a scale for each row; they are multiplied as fp32, a piece at a time.

    1. ``x @ W``, and ``x @ W.T`` in a Gemm or behind a Transpose.
    2. Both of one matrix, a large one: in pieces of its rows.
    """
    return pack_matrices(model.graph, frozen_inputs(model), ROWS)


def int4_tables(model: ir.Model) -> bool:
    """Make tables 4-bit with a scale for each group of a row.

    1. A table whose rows are whole groups, that ``Gather`` alone reads: the rows looked up become fp32.
    """
    return pack_tables(model.graph, frozen_inputs(model), INT4)


def int4_matrices(model: ir.Model) -> bool:
    """Make matrices of products 4-bit with a scale for each group of a row; multiplied as fp32, a piece at a time.

    1. ``x @ W``, and ``x @ W.T`` in a Gemm or behind a Transpose, where the rows of W are whole groups.
    2. Both of one matrix, a large one: in pieces of its rows.
    """
    return pack_matrices(model.graph, frozen_inputs(model), INT4)


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
