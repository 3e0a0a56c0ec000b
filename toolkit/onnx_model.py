"""A merged model as a folder that plain onnxruntime runs: ``model.onnx``, its configuration, its tokenizer or processor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetune.device_runtime.engine.onnx_graphs import OnnxGraph, array_of, value_of
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.program import Program
from fleetune.exporters.onnx.inference import LOGITS, MODEL, write_inference
from fleetune.toolkit.hearing import told_shortly
from fleetune.toolkit.programs import plain_program

TOLERANCE = 1e-4
"""Largest difference between a logit of the file and of the model in torch, over the largest of the batch."""
_SIZES = ((1, 7), (3, 12))
"""(batch, seq) that are compared; no trace was made at them."""


def write_onnx(merged: Any, readers: Sequence[Any], out: Path, *, task: str) -> None:
    """Write a merged model in float32, as it lies in memory, with tokenizer or processor.

    Raises:
        ExportError: the model has no ONNX translation, or answers otherwise from its file.
    """
    program = plain_program(merged, readers, task=task)
    write_inference(program, out)
    with told_shortly(f"{out.name}: cannot be written"):
        merged.config.save_pretrained(str(out))
        for part in readers:
            if part is not None:
                part.save_pretrained(str(out))
    _check_answers(program, out / MODEL)


def _check_answers(program: Program, path: Path) -> None:
    """Run the file on batches that were not traced; ExportError unless it answers as the model does."""
    graph = OnnxGraph(path, threads=0)
    for batch_size, seq in _SIZES:
        batch = program.make_batch(batch_size, min(seq, program.longest or seq))
        with torch.no_grad():
            wanted = program.logits(batch).numpy()
        names = [row.name for row in program.inputs if row.name != program.label_name]
        found = array_of(graph.run({name: value_of(batch[name].numpy()) for name in names}, [LOGITS])[0])
        error = float(np.abs(found - wanted).max() / np.abs(wanted).max())
        if not error <= TOLERANCE:
            raise ExportError(
                f"{path.name}: its logits of {batch_size} x {seq} differ from the merged model's by {error:.1e} of the largest; "
                f"expected {TOLERANCE:g} at most; take --full instead"
            )
