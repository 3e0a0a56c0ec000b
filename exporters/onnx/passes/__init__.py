"""Small named passes over ONNX graphs, each exact; :func:`simplify` runs them in order until nothing changes."""

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from fleetune.exporters.onnx.passes.gelu_slope import folded_gauss, half_of_erf
from fleetune.exporters.onnx.passes.scaled_products import scaled_products
from fleetune.exporters.onnx.passes.shapes import gradient_shapes

Pass = Callable[[ir.Model], bool]

PASSES: tuple[Pass, ...] = (
    gradient_shapes,
    half_of_erf,
    folded_gauss,
)
FUSIONS: tuple[Pass, ...] = (scaled_products,)
"""Run after frozen matrices have found their storage: they make operators of onnxruntime's own, which the int8 pass skips."""


def simplify(model: ir.Model) -> None:
    """Rewrite ``model`` in place: our passes, then duplicates and dead nodes removed, in topological order."""
    _run(model, PASSES)
    common.ClearMetadataAndDocStringPass()(model)


def fuse(model: ir.Model) -> None:
    """Rewrite ``model`` in place with operators of onnxruntime's own domain."""
    _run(model, FUSIONS)


def _run(model: ir.Model, passes: tuple[Pass, ...]) -> None:
    while sum([step(model) for step in passes]):
        tidy(model)
    tidy(model)


def tidy(model: ir.Model) -> None:
    """Topological order, and nothing that is named twice, made twice or not used."""
    common.TopologicalSortPass()(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
