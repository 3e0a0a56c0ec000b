"""Small named passes over ONNX models, and the pipelines that run them.

A pass takes a model, rewrites its graph in place and returns whether it changed anything. What it requires and ensures stands in
its row of ``PASSES``; ``tests/exporters/onnx/test_passes.py`` holds every row to it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.passes import common

from fleetune.device_runtime.errors import ExportError
from fleetune.device_runtime.tables import Table
from fleetune.exporters.onnx.passes.frozen import are_float32, are_read_by_standard_operators
from fleetune.exporters.onnx.passes.gelu_slope import folded_gauss, gelu_from_slope, half_of_erf
from fleetune.exporters.onnx.passes.scaled_products import scaled_products
from fleetune.exporters.onnx.passes.shapes import early_shapes
from fleetune.exporters.onnx.passes.storage import (
    fp16_storage,
    int4_matrices,
    int4_tables,
    int8_storage,
    row_matrices,
    row_tables,
)

Condition = Callable[[ir.Model], bool]


class Ensured(NamedTuple):
    """Holds after a pass: the checker is content, names, dtypes and shapes of inputs and outputs are the same, values agree.

    within: largest difference of an output over its largest value, against the model before.
    stores: the frozen inputs have another form instead; values agree with what the form keeps of them.
    """

    within: float = 2e-6
    stores: bool = False


class Pass(NamedTuple):
    """A pass, the conditions that the model must meet before, and what holds after."""

    run: Callable[[ir.Model], bool]
    requires: tuple[Condition, ...] = ()
    ensures: Ensured = Ensured()


def tidy(model: ir.Model) -> bool:
    """Topological order, and nothing that is named twice, made twice or not used.

    1. A node that stands before one it reads moves behind it.
    2. ``Identity(x)`` that is no output is x.
    3. Equal nodes with equal inputs are one.
    4. A node that nothing reads goes.
    """
    passes = (
        common.TopologicalSortPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    modified = [step(model).modified for step in passes]
    return any(modified)


_STORAGE = (are_float32, are_read_by_standard_operators)
PASSES = Table(
    "pass",
    {
        "tidy": Pass(tidy),
        "early_shapes": Pass(early_shapes),
        "half_of_erf": Pass(half_of_erf),
        "folded_gauss": Pass(folded_gauss),
        "gelu_from_slope": Pass(gelu_from_slope),
        "scaled_products": Pass(scaled_products),
        "fp16_storage": Pass(fp16_storage, _STORAGE, Ensured(stores=True)),
        "int8_storage": Pass(int8_storage, _STORAGE, Ensured(within=0.02, stores=True)),
        "row_tables": Pass(row_tables, _STORAGE, Ensured(stores=True)),
        "row_matrices": Pass(row_matrices, _STORAGE, Ensured(stores=True)),
        "int4_tables": Pass(int4_tables, _STORAGE, Ensured(stores=True)),
        "int4_matrices": Pass(int4_matrices, _STORAGE, Ensured(stores=True)),
    },
)


class Storage(NamedTuple):
    """The passes that give frozen inputs a storage, in blocks and outside of them."""

    blocks: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


STORAGES: Table[Storage] = Table(
    "storage",
    {
        "fp32": Storage(),
        "fp16": Storage(("fp16_storage",), ("fp16_storage",)),
        "int8": Storage(("int8_storage",), ("row_tables", "row_matrices")),
        "int4": Storage(
            ("int4_matrices", "row_matrices"), ("int4_tables", "int4_matrices", "row_tables", "row_matrices")
        ),
    },
)


def apply(name: str, model: ir.Model) -> bool:
    """Run one pass, if the model meets what it requires.

    Raises:
        ExportError: a condition that is not met, in its own words.
    """
    chosen = PASSES[name]
    unmet = [condition for condition in chosen.requires if not condition(model)]
    if unmet:
        raise ExportError(f"pass {name}: {'; '.join((c.__doc__ or c.__name__).strip() for c in unmet)}")
    return chosen.run(model)


def simplify(model: ir.Model) -> bool:
    """What holds for any runtime; ends with metadata and names of the source cleared."""
    changed = _repeat(("early_shapes", "half_of_erf", "folded_gauss"), model)
    common.ClearMetadataAndDocStringPass()(model)
    return changed


def store(model: ir.Model, base_dtype: str, *, outside: bool = False) -> bool:
    """Give the frozen inputs their storage: those of a block, or those outside of the blocks."""
    storage = STORAGES[base_dtype]
    return _turn(storage.outside if outside else storage.blocks, model)


def fuse(model: ir.Model) -> bool:
    """Operators of onnxruntime's own domain; after :func:`store`, whose passes know only standard ones."""
    return _repeat(("scaled_products",), model)


def _repeat(names: Sequence[str], model: ir.Model) -> bool:
    """Take turns until one changes nothing; what is left is tidy."""
    changed = False
    while _turn(names, model):
        changed = True
    return tidy(model) or changed


def _turn(names: Sequence[str], model: ir.Model) -> bool:
    """Run each pass once, and tidy if one changed anything."""
    changed = [apply(name, model) for name in names]
    if any(changed):
        tidy(model)
    return any(changed)
