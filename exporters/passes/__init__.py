"""Small named passes over ONNX graphs, each exact; :func:`simplify` runs them in order until nothing changes."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from exporters.passes.shapes import gradient_shapes

Pass = Callable[[ir.Model], bool]

PASSES: tuple[Pass, ...] = (gradient_shapes,)


def simplify(model: ir.Model) -> None:
    """Rewrite ``model`` in place: our passes, then duplicates and dead nodes removed, in topological order."""
    while sum(step(model) for step in PASSES):
        tidy(model)
    tidy(model)
    common.ClearMetadataAndDocStringPass()(model)


def tidy(model: ir.Model) -> None:
    """Topological order, and nothing that is named twice, made twice or not used."""
    common.TopologicalSortPass()(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
