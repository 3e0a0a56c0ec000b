"""Products over batch and heads at once, without the reshapes that fold the two into one dimension and back."""

import onnx_ir as ir

from exporters.passes.building import add_node, become, describe

_SWAPPED = (0, 1, 3, 2)


def batched_products(model: ir.Model) -> bool:
    """``Reshape(MatMul(Reshape(a), Reshape(b)))`` between rank 4 and rank 3 becomes ``MatMul(a, b)``."""
    return sum(_unfold(node) for node in list(model.graph) if node.op_type == "MatMul") > 0


def split_transposes(model: ir.Model) -> bool:
    """A transpose that brings the heads forward and swaps (seq, width) too becomes two; products absorb the second."""
    changed = False
    for node in list(model.graph):
        if _perm(node) == (0, 2, 3, 1) and _only_products_read(node.outputs[0]):
            forward = add_node(node, "Transpose", [node.inputs[0]], perm=[0, 2, 1, 3])
            shape = list(node.outputs[0].shape or ())
            describe(
                forward.outputs[0], node.outputs[0].dtype or ir.DataType.FLOAT, [shape[i] for i in _SWAPPED]
            )
            become(node, "Transpose", [forward.outputs[0]], attributes=[ir.AttrInt64s("perm", _SWAPPED)])
            changed = True
    return changed


def turned_products(model: ir.Model) -> bool:
    """``Transpose(a @ b)`` that would put a's rows last becomes the transpose, heads back only, of ``b.T @ a.T``."""
    changed = False
    for node in list(model.graph):
        if _perm(node) != (0, 3, 1, 2) or node.inputs[0] is None:
            continue
        product = node.inputs[0].producer()
        if product is None or product.op_type != "MatMul" or not _read_once(product.outputs[0]):
            continue
        left, right = product.inputs
        if left is None or right is None or len(_dims(left)) != 4 or len(_dims(right)) != 4:
            continue
        shape = list(product.outputs[0].shape or ())
        become(product, "MatMul", [_swapped(product, right), _swapped(product, left)])
        describe(product.outputs[0], left.dtype or ir.DataType.FLOAT, [shape[i] for i in _SWAPPED])
        become(node, "Transpose", [product.outputs[0]], attributes=[ir.AttrInt64s("perm", (0, 2, 1, 3))])
        changed = True
    return changed


def _unfold(product: ir.Node) -> bool:
    a, b = (None if v is None else _unfolded(v) for v in product.inputs)
    folded = product.outputs[0]
    backs = [use.node for use in folded.uses()]
    if a is None or b is None or folded.is_graph_output() or a[0].shape is None or b[0].shape is None:
        return False
    heads, shape = _dims(a[0])[:2], _dims(folded)
    if _dims(b[0])[:2] != heads or len(shape) != 3:
        return False
    if not all(_unfolds(n, [*heads, *shape[1:]]) for n in backs):
        return False
    operands = [_swapped(product, value) if turned else value for value, turned in (a, b)]
    whole = list(a[0].shape)[:2] + list(folded.shape or ())[1:]
    become(product, "MatMul", operands)
    describe(folded, a[0].dtype or ir.DataType.FLOAT, whole)
    for back in backs:
        back.outputs[0].replace_all_uses_with(folded, replace_graph_outputs=False)
    return True


def _unfolds(node: ir.Node, dims: list[str]) -> bool:
    value = node.outputs[0]
    return node.op_type == "Reshape" and _dims(value) == dims and not value.is_graph_output()


def _unfolded(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """The value of rank 4 that ``value`` of rank 3 was folded from, and whether its last two dimensions are swapped."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    if _perm(node) == (0, 2, 1):
        inner = _unfolded(node.inputs[0])
        return None if inner is None else (inner[0], not inner[1])
    source = node.inputs[0]
    if node.op_type != "Reshape" or len(_dims(source)) != 4 or len(_dims(value)) != 3:
        return None
    return (source, False) if _dims(source)[2:] == _dims(value)[1:] else None


def _swapped(before: ir.Node, value: ir.Value) -> ir.Value:
    """``value`` of rank 4 with its last two dimensions swapped; of what is swapped already, the original."""
    made = value.producer()
    if made is not None and _perm(made) == _SWAPPED and made.inputs[0] is not None:
        return made.inputs[0]
    node = add_node(before, "Transpose", [value], perm=list(_SWAPPED))
    shape = list(value.shape or ())
    return describe(node.outputs[0], value.dtype or ir.DataType.FLOAT, [shape[i] for i in _SWAPPED])


def _read_once(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _only_products_read(value: ir.Value) -> bool:
    return not value.is_graph_output() and all(
        use.node.op_type in ("MatMul", "FusedMatMul") or _perm(use.node) == _SWAPPED for use in value.uses()
    )


def _perm(node: ir.Node) -> tuple[int, ...]:
    found = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return () if found is None else tuple(found.as_ints())


def _dims(value: ir.Value) -> list[str]:
    return [] if value.shape is None else [str(d) for d in value.shape]
