"""The cut between forward and backward keeps the fewest bytes, and nothing that can be had for free."""

import onnx_ir as ir
import pytest

from fleetune.device_runtime.contracts.manifest import Role
from fleetune.exporters.onnx.partition import saved_values

SIZES = {"batch": 4, "seq": 8}
ROLES: dict[str, tuple[Role, int]] = {
    "x": ("hidden", 0),
    "dy": ("d_hidden", 0),
    "w": ("weight", 0),
    "y": ("hidden", 0),
    "dx": ("d_hidden", 0),
}


def value(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def node(op: str, inputs: list[ir.Value], output: ir.Value) -> ir.Node:
    return ir.Node("", op, inputs, outputs=[output])


@pytest.fixture
def joint() -> tuple[ir.Graph, dict[str, ir.Value]]:
    """Y = tanh(x @ w) * 2, where tanh cannot be made again cheaply and the product is wide."""
    v = {n: value(n, "batch", "seq", 16) for n in ("x", "dy", "y", "dx")}
    v["w"] = value("w", 16, 64)
    for name in ("wide", "tanh", "doubled", "slope"):
        v[name] = value(name, "batch", "seq", 64)
    v["narrow"] = value("narrow", "batch", "seq", 1)
    v["grad"] = value("grad", "batch", "seq", 64)
    nodes = [
        node("MatMul", [v["x"], v["w"]], v["wide"]),
        node("Tanh", [v["wide"]], v["tanh"]),
        node("Add", [v["tanh"], v["tanh"]], v["doubled"]),
        node("ReduceMean", [v["doubled"]], v["narrow"]),
        node("Add", [v["x"], v["narrow"]], v["y"]),
        node("Mul", [v["doubled"], v["narrow"]], v["slope"]),
        node("Mul", [v["slope"], v["dy"]], v["grad"]),
        node("ReduceSum", [v["grad"]], v["dx"]),
    ]
    graph = ir.Graph([v["x"], v["dy"], v["w"]], [v["y"], v["dx"]], nodes=nodes, opset_imports={"": 20})
    return graph, v


def test_one_value_is_kept_of_a_cheap_chain(joint: tuple[ir.Graph, dict[str, ir.Value]]) -> None:
    graph, _ = joint
    names = [v.name for v in saved_values(graph, ROLES, sizes=SIZES)]
    assert len(names) == 1
    assert names[0] in {"tanh", "doubled", "slope"}


def test_what_is_an_input_already_is_not_kept(joint: tuple[ir.Graph, dict[str, ir.Value]]) -> None:
    graph, v = joint
    graph.append(node("Mul", [v["x"], v["dy"]], value("extra", "batch", "seq", 16)))
    assert "x" not in [s.name for s in saved_values(graph, ROLES, sizes=SIZES)]


def test_a_backward_that_reads_nothing_needs_nothing_kept() -> None:
    x, dy, y, dx = (value(n, "batch", 4) for n in ("x", "dy", "y", "dx"))
    graph = ir.Graph(
        [x, dy], [y, dx], nodes=[node("Neg", [x], y), node("Neg", [dy], dx)], opset_imports={"": 20}
    )
    assert saved_values(graph, ROLES, sizes=SIZES) == []
