"""The forward graph of a model cut to some of its layers, as ``onnxruntime-training`` 1.19 can differentiate it.

Opset 14 by the TorchScript exporter: from opset 17 on there is a LayerNormalization operator, whose gradient that version cannot
build. Every frozen parameter is an input of the graph, so that the models of all depths share one file of weights.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.onnx import TrainingMode

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import Anatomy
from fleetune.exporters.model.golden import without
from fleetune.exporters.model.program import Program, tensors_of, traced_sizes
from fleetune.exporters.model.tracing import quiet

OPSET = 14
LOSS, LOGITS = "loss", "logits"
PREFIX = "held."


@dataclass(frozen=True)
class DepthGraph:
    """A forward graph of the lowest ``depth`` layers; ``frozen`` are inputs beside the batch, ``trained`` are initializers.

    Both map a name in the graph to that of the tensor in the program's module, the first one where several are tied. A frozen
    tensor that is used in several places is as many inputs.
    """

    depth: int
    content: bytes
    frozen: dict[str, str]
    trained: dict[str, str]


def depth_graph(program: Program, anatomy: Anatomy, *, depth: int) -> DepthGraph:
    """Trace the model with its lowest ``depth`` layers and the loss; outputs are the loss and the logits.

    Raises:
        ExportError: the exporter has no translation at this opset; names the operator.
    """
    batch = program.make_batch(*traced_sizes(program))
    model = _converted(_Cut(program, anatomy, depth, tuple(batch)), batch)
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    kept = [row for row in graph.input if row.name in used]
    weights = tuple(row.name.removeprefix(PREFIX) for row in kept if row.name not in batch)
    tensors = tensors_of(program.module)
    stray = sorted(set(weights) - tensors.keys())
    if stray or graph.initializer:
        named = stray or [row.name for row in graph.initializer]
        raise ExportError(f"backend ort-training: inputs {', '.join(named[:5])} are no tensors of the module")
    trained = {f"{PREFIX}{n}": n for n in weights if tensors[n].requires_grad}
    frozen = {f"{PREFIX}{n}": n for n in weights if not tensors[n].requires_grad}
    _make_parameters(model, {name: tensors[n] for name, n in trained.items()}, kept)
    frozen |= {copy: frozen[name] for copy, name in _split_uses(graph, set(frozen))}
    return DepthGraph(depth, model.SerializeToString(), frozen, trained)


class _Cut(nn.Module):
    """Batch in the order of ``names`` -> loss and logits, the layers from ``depth`` on being the identity."""

    def __init__(self, program: Program, anatomy: Anatomy, depth: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.held = program.module
        self._program, self._anatomy, self._names = program, anatomy, names
        self._dropped = range(depth, len(anatomy.calls))

    def forward(self, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        batch = dict(zip(self._names, arrays, strict=True))
        with without(self._anatomy, self._dropped):
            logits = self._program.logits(batch)
        return self._program.loss(logits, batch[self._program.label_name]), logits


def _converted(cut: nn.Module, batch: dict[str, Tensor]) -> Any:
    with tempfile.TemporaryDirectory() as folder, quiet():
        file = Path(folder) / "forward.onnx"
        try:
            torch.onnx.export(
                cut,
                tuple(batch.values()),
                file,
                input_names=list(batch),
                output_names=[LOSS, LOGITS],
                dynamic_axes=_axes(batch),
                opset_version=OPSET,
                dynamo=False,
                do_constant_folding=False,
                export_params=False,
                training=TrainingMode.PRESERVE,
            )
        except Exception as exc:
            first = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            raise ExportError(f"backend ort-training: no graph at opset {OPSET}: {first}") from exc
        return onnx.load(file)


def _axes(batch: dict[str, Tensor]) -> dict[str, dict[int, str]]:
    """Batch and sequence vary: the first dimension of every array, and the second of those that have just two."""
    return {n: {0: "batch"} | ({1: "seq"} if a.ndim == 2 else {}) for n, a in batch.items()}


def _make_parameters(model: Any, trained: dict[str, Tensor], inputs: list[Any]) -> None:
    """Turn the inputs named in ``trained`` into initializers with their values."""
    kept = [row for row in inputs if row.name not in trained]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    for name, tensor in trained.items():
        model.graph.initializer.append(numpy_helper.from_array(tensor.detach().numpy(), name))


def _split_uses(graph: Any, frozen: set[str]) -> Iterator[tuple[str, str]]:
    """Give every further use of a frozen input an input of its own; yields (new, old) names.

    The gradient of a layer norm names that of its frozen scale too, which clashes if a shared block uses the scale again.
    """
    rows = {row.name: row for row in graph.input}
    seen: Counter[str] = Counter()
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name not in frozen:
                continue
            seen[name] += 1
            if seen[name] > 1:
                copy = f"{name}#{seen[name]}"
                graph.input.add().CopyFrom(rows[name])
                graph.input[-1].name = node.input[place] = copy
                yield copy, name
