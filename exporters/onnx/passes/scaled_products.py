"""A constant factor before or after a matrix product goes into the product: one pass over memory less."""

import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import CONTRIB, become, factor_of

_MOVES = ("Reshape", "Transpose")


def scaled_products(model: ir.Model) -> bool:
    """Put constant factors into FusedMatMul's ``alpha``; a Reshape or Transpose may stand between, and factors multiply.

    1. ``Mul(MatMul(a, b), c)``, where nothing else reads the product.
    2. ``Mul(x, c)`` that only products read, each once.
    """
    changed = False
    for node in list(model.graph):
        found = factor_of(node)
        if found is None or node.outputs[0].is_graph_output():
            continue
        value, factor = found
        products = _product_behind(value) or _products_ahead(node.outputs[0])
        for product in products:
            _scale(product, factor)
        if products:
            node.outputs[0].replace_all_uses_with(value)
            changed = True
    return changed


def _product_behind(value: ir.Value) -> list[ir.Node]:
    """The product that alone makes ``value``, through reshapes, if nobody else reads it."""
    node = value.producer()
    if node is None or value.is_graph_output() or len(value.uses()) != 1:
        return []
    if node.op_type in _MOVES:
        return _product_behind(node.inputs[0])
    return [node] if _is_product(node) else []


def _products_ahead(value: ir.Value) -> list[ir.Node]:
    """The products that read ``value``, through reshapes; empty if anything else reads it, or one reads it twice."""
    found: list[ir.Node] = []
    for node, place in value.uses():
        if node.op_type in _MOVES and place == 0 and not node.outputs[0].is_graph_output():
            more = _products_ahead(node.outputs[0])
        else:
            more = [node] if _is_product(node) else []
        if not more or set(more) & set(found):
            return []
        found += more
    return found


def _is_product(node: ir.Node) -> bool:
    return (node.domain, node.op_type) in (("", "MatMul"), (CONTRIB, "FusedMatMul"))


def _scale(product: ir.Node, factor: float) -> None:
    kept = {name: attribute for name, attribute in product.attributes.items() if name != "alpha"}
    before = product.attributes["alpha"].as_float() if "alpha" in product.attributes else 1.0
    alpha = ir.AttrFloat32("alpha", before * factor)
    become(product, "FusedMatMul", list(product.inputs), domain=CONTRIB, attributes=[*kept.values(), alpha])
