"""A model as one ONNX file that answers: batch in, logits out, weights inside; operators of ONNX alone."""

from pathlib import Path

import onnx
import onnx_ir as ir

from fleetune.exporters.model.program import Program, traced_sizes
from fleetune.exporters.model.sections import whole
from fleetune.exporters.onnx.graphs import convert

MODEL = "model.onnx"
_WEIGHTS = "model.onnx.data"
"""Beside the model, where both together are more than one protobuf may be."""
_ONE_FILE_MAX = 1536 * 1024**2
LOGITS = "logits"


def write_inference(program: Program, folder: Path) -> None:
    """Write ``model.onnx`` of a model whose inputs are called as the program's; batch and sequence may be of any size.

    Raises:
        ExportError: the tracer cannot follow, the forward takes a size for a constant, or an operator has no translation.
    """
    sizes = traced_sizes(program)
    section = whole(program, sizes=sizes)
    model, _ = convert(section, sizes=sizes)
    weights = 0
    for value, argument in zip(list(model.graph.inputs), section.arguments, strict=True):
        if argument.role == "batch":
            value.name = argument.name
            continue
        model.graph.inputs.remove(value)
        if value.uses():
            array = argument.example.detach().contiguous().numpy()
            value.name, value.const_value = argument.name, ir.tensor(array, name=argument.name)
            model.graph.register_initializer(value)
            weights += array.nbytes
    model.graph.outputs[0].name = LOGITS
    model.ir_version, model.producer_name = 10, "fleetune"
    ir.save(model, folder / MODEL, external_data=_WEIGHTS if weights > _ONE_FILE_MAX else None)
    onnx.checker.check_model(str(folder / MODEL))
