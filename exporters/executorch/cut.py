"""Cuts a traced joint program at fx level: what the backward keeps, and programs of a part of the graph."""

import operator
from collections.abc import Mapping, Sequence

import torch
import torch.utils._pytree as pytree
from torch import SymInt, Tensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node

from fleetune.exporters.model.mincut import FREE, NEVER, Candidate, cheapest

aten = torch.ops.aten
# What the backward may do again: operators that stream over memory once, and those that only rename a shape.
_CHEAP_NAMES = """
    add sub mul div neg abs exp sqrt rsqrt reciprocal pow clamp maximum minimum where eq ne lt le gt ge
    logical_and logical_or logical_not bitwise_not bitwise_and bitwise_or
    view permute_copy unsqueeze squeeze expand clone slice select cat split_with_sizes full full_like arange _to_copy sym_size
"""
CHEAP = frozenset(getattr(aten, name) for name in _CHEAP_NAMES.split())


_RATHER_NOT = 1e12  # positions are made again; what a router has chosen cannot be


def saved_values(graph: Graph, gradient: Node, *, extents: Mapping[str, int]) -> list[Node]:
    """The values that cost the fewest bytes to keep for the nodes that depend on ``gradient``.

    Args:
        graph: a tidy joint graph.
        gradient: the input that carries the gradient of the block's output.
        extents: nominal size of each symbol, to weigh values in bytes.
    """
    late = _dependents(graph, gradient)
    early = [n for n in graph.nodes if n not in late and n.op != "output"]
    candidates = [
        Candidate(n, _bytes(n, extents), _sources(n), any(u in late for u in n.users)) for n in early
    ]
    kept = set(cheapest(candidates))
    return [n for n in early if n in kept and n.op != "placeholder"]


def part(program: ExportedProgram, inputs: Sequence[Node], outputs: Sequence[Node]) -> ExportedProgram:
    """The program that computes ``outputs`` from those of ``inputs`` (in their order) that it needs; constants go along.

    Each output is a value of its own: what is an input too, or leaves twice, is copied.
    """
    constants = {s.arg.name: s for s in program.graph_signature.input_specs if s.kind != InputKind.USER_INPUT}
    needed = _ancestors(outputs, set(inputs))
    held = [n for n in program.graph.nodes if n.name in constants and n in needed]
    given = [n for n in inputs if n in needed]
    graph, copies = Graph(), dict[Node, Node]()
    for node in (*held, *given):
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = {**node.meta, "val": node.meta["val"].contiguous()}  # what is fed has no strides
    for node in program.graph.nodes:
        if node in needed and node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    leaving = [_own(graph, copies[node], i, outputs) for i, node in enumerate(outputs)]
    graph.output(tuple(leaving))
    signature = ExportGraphSignature(
        [constants[n.name] for n in held]
        + [InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in given],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in leaving],
    )
    return ExportedProgram(
        GraphModule(torch.nn.Module(), graph),
        graph,
        signature,
        program.state_dict,
        program.range_constraints,
        [_entry(len(given), len(leaving))],
        constants=program.constants,
    )


def inputs_of(program: ExportedProgram) -> list[Node]:
    """The nodes of the user's inputs, in order."""
    by_name = {n.name: n for n in program.graph.nodes}
    return [by_name[name] for name in program.graph_signature.user_inputs]


def outputs_of(program: ExportedProgram) -> list[Node]:
    """The nodes of the outputs, in order."""
    last = next(n for n in reversed(program.graph.nodes) if n.op == "output")
    return list(last.args[0])


def _entry(inputs: int, outputs: int) -> ModuleCallEntry:
    """How the whole program is called: a tuple of tensors in, a tuple out."""
    entering = pytree.tree_structure(((0,) * inputs, {}))
    leaving = pytree.tree_structure((0,) * outputs)
    return ModuleCallEntry("", ModuleCallSignature([], [], entering, leaving))


def _dependents(graph: Graph, root: Node) -> set[Node]:
    late = {root}
    for node in graph.nodes:
        if node.op != "output" and any(n in late for n in node.all_input_nodes):
            late.add(node)
    return late


def _ancestors(outputs: Sequence[Node], given: set[Node]) -> set[Node]:
    needed: set[Node] = set()
    waiting = list(outputs)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += [] if node in given else node.all_input_nodes
    return needed


def _own(graph: Graph, node: Node, place: int, outputs: Sequence[Node]) -> Node:
    if node.op != "placeholder" and list(outputs).index(outputs[place]) == place:
        return node
    copy = graph.call_function(aten.clone.default, (node,))
    copy.meta = {"val": node.meta["val"].clone()}
    return copy


def _sources(node: Node) -> tuple[Node, ...] | None:
    again = node.target is operator.getitem or isinstance(node.meta.get("val"), SymInt)
    again |= getattr(node.target, "overloadpacket", None) in CHEAP
    return tuple(node.all_input_nodes) if again and node.op == "call_function" else None


def _bytes(node: Node, extents: Mapping[str, int]) -> float:
    if node.op == "placeholder":
        return FREE
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return NEVER
    if value.dtype == torch.int64:
        return _RATHER_NOT
    count = float(value.element_size())
    for extent in value.shape:
        count *= extent if isinstance(extent, int) else _nominal(extent, extents)
    return count + FREE


def _nominal(extent: SymInt, extents: Mapping[str, int]) -> float:
    expression = extent.node.expr
    return float(expression.subs({s: extents.get(str(s), 64) for s in expression.free_symbols}))
