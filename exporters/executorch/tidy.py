"""Cleans a traced graph before it is cut: fewer shape operators, so that fewer break a delegated run.

XNNPACK takes a reshape with at most one dynamic dimension, and neither ``unsqueeze`` nor ``alias``; a copy that it would drop
at the border of a delegated run is refused ("pass through arguments").
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten
_VIEWS = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_SAME = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.clone.default)


def tidy(graph: Graph) -> None:
    """Rewrite ``graph`` in place; values and their shapes stay what they are."""
    _share_sizes(graph)
    _settle(graph)
    _apply((_drop_copies, _as_views, _join_permutes, _as_linear), graph)
    _apply((_into_bias, _as_views), graph)
    _share(graph)
    graph.eliminate_dead_code()


def sizes_of(graph: Graph) -> dict[Any, Node]:
    """Size nodes by their expression."""
    return {n.meta["val"].node.expr: n for n in graph.nodes if isinstance(n.meta.get("val"), SymInt)}


def _apply(rules: Sequence[Callable[[Any, Graph], None]], graph: Graph) -> None:
    """Each rule to every call, then drop what nobody uses; not before, as reshapes may come to use a size."""
    for rule in rules:
        for node in list(graph.nodes):
            if node.op == "call_function":
                rule(node, graph)
    graph.eliminate_dead_code()


def _share_sizes(graph: Graph) -> None:
    """One node per size, as early as can be; plain sizes are read off the first input that has them."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    known: dict[Any, Node] = {}
    with graph.inserting_after(inputs[-1]):
        for node, dim, size in _dimensions(inputs):
            if size.node.expr.is_symbol and size.node.expr not in known:
                made = graph.call_function(aten.sym_size.int, (node, dim))
                made.meta["val"] = size
                known[size.node.expr] = made
    plain = list(known.values())
    for node in list(graph.nodes):
        if isinstance(node.meta.get("val"), SymInt) and node not in plain:
            first = known.setdefault(node.meta["val"].node.expr, node)
            if first is not node:
                _replace(node, first, graph)
    _hoist(list(known.values())[len(plain) :], [*inputs, *plain])


def _hoist(sizes: Sequence[Node], early: Sequence[Node]) -> None:
    """Put what is computed of other sizes right behind ``early``, so that any reshape may use it."""
    before, last = set(early), max(early)
    for node in sizes:
        if before.issuperset(node.all_input_nodes):
            last.append(node)
            last = node
            before.add(node)


def _settle(graph: Graph) -> None:
    """Values as the runtime holds them, one after the other: there every permutation copies, so that no clone need follow."""
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            node.meta["val"] = node.meta["val"].contiguous()
        if node.target is aten.permute.default:
            node.target = aten.permute_copy.default


def _dimensions(inputs: Sequence[Node]) -> list[tuple[Node, int, SymInt]]:
    found = [(n, n.meta["val"]) for n in inputs if isinstance(n.meta.get("val"), Tensor)]
    return [(n, d, e) for n, v in found for d, e in enumerate(v.shape) if isinstance(e, SymInt)]


def _drop_copies(node: Any, graph: Graph) -> None:
    same = node.target in _SAME
    same |= node.target is aten.expand.default and _value(node).shape == _value(node.args[0]).shape
    if same:
        _replace(node, node.args[0], graph)


def _as_views(node: Any, graph: Graph) -> None:
    """Every reshape as one view of its origin, with -1 for the only dynamic dimension."""
    if node.target not in _VIEWS:
        return
    origin, shape = _origin(node.args[0]), list(_value(node).shape)
    if _value(origin).shape == _value(node).shape:
        _replace(node, origin, graph)
        return
    dynamic = [i for i, extent in enumerate(shape) if isinstance(extent, SymInt)]
    if len(dynamic) == 1:
        shape[dynamic[0]] = -1
    known = {expression: size for expression, size in sizes_of(graph).items() if size < node}
    extents = [e if isinstance(e, int) else known.get(e.node.expr) for e in shape]
    if None not in extents:
        node.target, node.args, node.kwargs = aten.view.default, (origin, extents), {}


def _join_permutes(node: Any, graph: Graph) -> None:
    turn = aten.permute_copy.default
    if node.target is not turn or node.args[0].target is not turn:
        return
    inner = node.args[0]
    order = [inner.args[1][i] for i in node.args[1]]
    if order == list(range(len(order))):
        _replace(node, inner.args[0], graph)
    else:
        node.args = (inner.args[0], order)


def _as_linear(node: Any, graph: Graph) -> None:
    """A product with a turned matrix as ``linear``, which takes the matrix as it lies and rows of any rank."""
    if node.target is not aten.bmm.default or _value(node).shape[0] != 1:
        return
    rows, turned = node.args[0], _origin(node.args[1])
    if turned.target is not aten.permute_copy.default or list(turned.args[1]) != [1, 0]:
        return
    if _value(turned).shape != _value(node.args[1]).shape[1:]:
        return
    rows = _origin(rows) if _value(_origin(rows)).shape[-1] == _value(rows).shape[-1] else rows
    with graph.inserting_before(node):
        product = _call(graph, aten.linear.default, (rows, turned.args[0]))
    node.target, node.args = aten.view.default, (product, [1, -1, _value(node).shape[-1]])


def _into_bias(node: Any, graph: Graph) -> None:
    """An input that is added to the rows of a product as that product's bias."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return
    for one, vector in (node.args, node.args[::-1]):
        product = _origin(one)
        alone = len(product.users) == len(one.users) == 1 and vector.op == "placeholder"
        if alone and product.target is aten.linear.default and len(product.args) == 2:
            if _value(vector).shape == _value(one).shape[-1:] == _value(product).shape[-1:]:
                product.args = (*product.args, vector)
                _replace(node, one, graph)
            return


def _origin(node: Any) -> Any:
    """What ``node`` is a view of."""
    while node.target is aten.view.default:
        node = node.args[0]
    return node


def _call(graph: Graph, target: Any, args: tuple[Node, ...]) -> Node:
    node = graph.call_function(target, args)
    values = [_value(a) for a in args]
    with values[0].fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = target(*values)
    return node


def _share(graph: Graph) -> None:
    """Equal calls become one."""
    seen: dict[tuple[Any, str, str], Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                _replace(node, first, graph)


def _replace(node: Node, other: Node, graph: Graph) -> None:
    node.replace_all_uses_with(other)
    graph.erase_node(node)


def _value(node: Node) -> Tensor:
    value: Tensor = node.meta["val"]
    return value
