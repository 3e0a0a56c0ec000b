"""Which inputs of a model are frozen weights, and in which form they come in. Marks are kept in the values' ``meta``."""

from collections.abc import Iterable

import onnx_ir as ir

from fleetune.exporters.onnx.passes.building import FLOAT

_FROZEN, _FORM = "fleetune.frozen", "fleetune.form"


def mark_frozen(weights: Iterable[ir.Value]) -> None:
    """Mark inputs as weights that never learn."""
    for weight in weights:
        weight.meta[_FROZEN] = True


def frozen_inputs(model: ir.Model) -> list[ir.Value]:
    """The marked inputs, in order."""
    return [value for value in model.graph.inputs if value.meta.get(_FROZEN)]


def note_form(value: ir.Value, weight: ir.Value, form: str) -> None:
    """Say that the input ``value`` holds a form of ``weight``, by its name in ``quantize.FORMS``."""
    value.meta[_FORM] = str(weight.name), form


def forms_of(model: ir.Model) -> dict[str, tuple[str, str]]:
    """Name of each input that holds a form -> the weight's name, and the form's."""
    return {str(v.name): v.meta[_FORM] for v in model.graph.inputs if _FORM in v.meta}


def are_float32(model: ir.Model) -> bool:
    """Frozen inputs must be float32."""
    return all(value.dtype == FLOAT for value in frozen_inputs(model))


def are_read_by_standard_operators(model: ir.Model) -> bool:
    """Frozen inputs must be read by standard operators alone."""
    return all(use.node.domain in ("", "ai.onnx") for v in frozen_inputs(model) for use in v.uses())
