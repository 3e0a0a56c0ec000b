"""Writes an artifact for ONNX Runtime Training: the official files for each number of active layers, and the weights once."""

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import torch

from fleetune.device_runtime.contracts.artifact import GOLDEN
from fleetune.device_runtime.contracts.manifest import Kind, Layer, Manifest, Section
from fleetune.device_runtime.contracts.ort_training_layout import (
    FORMAT,
    INSTALL,
    LAYOUT,
    Bound,
    DepthModel,
    Layout,
)
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.assembly import Description, Structure, assemble, new_folder
from fleetune.exporters.model.anatomy import Anatomy, find_anatomy, stream
from fleetune.exporters.model.golden import record_golden
from fleetune.exporters.model.kinds import group_kinds
from fleetune.exporters.model.program import (
    Program,
    check_mean,
    tensors_of,
    traced_sizes,
    trainable_names,
)
from fleetune.exporters.ort_training.graphs import DepthGraph, depth_graph
from fleetune.exporters.storages import check_base_dtype
from fleetune.exporters.tensor_table import Slots, TensorTable, write_tensors

BACKEND = "ort-training"
PYTHON = "FLEETUNE_ORT_PYTHON"
"""Environment variable: the Python of the environment in which ``onnxruntime-training-cpu`` is installed."""
_ROOT = Path(__file__).resolve().parents[2]
_SCRIPT = Path(__file__).with_name("artifacts.py")


def write_ort_training(
    program: Program,
    description: Description,
    out: Path,
    *,
    base_dtype: str = "fp32",
    depths: Sequence[int] | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Export ``program`` into the folder ``out`` with one model per depth of ``depths`` (None: 1 to all layers).

    Raises:
        ConfigError: no such storage of frozen weights.
        ExportError: another storage than fp32, the environment of ONNX Runtime Training is missing, blocks that differ, an
            operator without translation or gradient, or a folder in the way.
    """
    check_base_dtype(base_dtype, backend=BACKEND)
    python = training_python()
    sizes = traced_sizes(program)
    on_progress("finding the blocks")
    anatomy = find_anatomy(program, batch=sizes[0], seq=sizes[1])
    _check_alike(anatomy)
    _check_loss(program, sizes)
    graphs = _traced(program, anatomy, _checked_depths(depths, len(anatomy.calls)), on_progress)
    places = _Places(program, anatomy, graphs)
    with new_folder(out) as folder:
        on_progress("writing weights")
        table = write_tensors(folder, program, Slots([], places.layers, places.outside))
        on_progress(f"generating training, eval and optimizer models for {len(graphs)} depths")
        _write_models(folder, graphs, places.of_tensors(table), python)
        on_progress("recording the golden step")
        record_golden(program, anatomy, folder / GOLDEN)
        structure = _structure(program, anatomy, table, places)
        return assemble(folder, description, structure, backend=BACKEND)


def training_python() -> Path:
    """The Python that has ``onnxruntime-training-cpu``: as ``FLEETUNE_ORT_PYTHON`` says, else that of ``.venv-ort``.

    Raises:
        ExportError: there is none; says what to install.
    """
    named = os.environ.get(PYTHON)
    found = [Path(named)] if named else [root / ".venv-ort/bin/python" for root in (Path.cwd(), _ROOT)]
    for python in found:
        if python.is_file():
            return python
    raise ExportError(
        "backend ort-training: its artifacts are generated in an environment of their own, and "
        f"{' and '.join(map(str, found))} is missing; run: {INSTALL} (or name its Python in {PYTHON})"
    )


def _traced(
    program: Program, anatomy: Anatomy, depths: Sequence[int], on_progress: Callable[[str], None]
) -> list[DepthGraph]:
    graphs = []
    for depth in depths:
        on_progress(f"tracing {depth} of {len(anatomy.calls)} layers in {anatomy.path}")
        graphs.append(depth_graph(program, anatomy, depth=depth))
    return graphs


class _Places:
    """Which tensors each layer has, in one order for all layers, and which are outside the blocks; names as in the module."""

    def __init__(self, program: Program, anatomy: Anatomy, graphs: Sequence[DepthGraph]) -> None:
        used = {name for graph in graphs for name in (*graph.frozen.values(), *graph.trained.values())}
        paths = [call.path for call in anatomy.calls]
        inside = {f"{path}.{name}" for path in paths for name in tensors_of(anatomy.calls[0].module)}
        names = [
            name
            for name in tensors_of(anatomy.calls[0].module)
            if any(f"{path}.{name}" in used for path in paths)
        ]
        self.layers = [[f"{path}.{name}" for name in names] for path in paths]
        self.outside = [name for name in tensors_of(program.module) if name in used - inside]
        unreached = set(trainable_names(program.module)) - inside - used
        if unreached:
            raise ExportError(
                f"trainable tensors that the loss does not reach: {', '.join(sorted(unreached))}"
            )

    def of_tensors(self, table: TensorTable) -> dict[str, tuple[int, int]]:
        """Where each tensor of a traced graph is found: (position, slot), or (-1, row of the table)."""
        places = {n: (-1, row) for n, row in zip(self.outside, table.indices(self.outside), strict=True)}
        for position in reversed(range(len(self.layers))):
            places |= {name: (position, slot) for slot, name in enumerate(self.layers[position])}
        return places


def _structure(program: Program, anatomy: Anatomy, table: TensorTable, places: _Places) -> Structure:
    """Layers and weights; the graphs of whole models stand in a file of their own."""
    return Structure(
        inputs=program.inputs,
        prelude=Section({}),
        kinds=(Kind({}),),
        layers=tuple(Layer(0, table.indices(names), ()) for names in places.layers),
        head=Section({}, table.indices(places.outside), counted=program.counted or "rows"),
        tensors=table.rows,
        hidden_size=stream(anatomy.calls[0].output).shape[-1],
    )


def _write_models(
    folder: Path, graphs: Sequence[DepthGraph], places: dict[str, tuple[int, int]], python: Path
) -> None:
    """The official files of every depth, and the layout that says what is bound to their inputs."""
    models = tuple(_write_forward(graph, folder, places) for graph in graphs)
    _generate(python, folder, models)
    (folder / LAYOUT).write_bytes(msgspec.json.encode(Layout(FORMAT, models)))


def _write_forward(graph: DepthGraph, folder: Path, places: dict[str, tuple[int, int]]) -> DepthModel:
    inside = f"graphs/depth{graph.depth}"
    (folder / inside).mkdir(parents=True)
    (folder / inside / "forward.onnx").write_bytes(graph.content)
    frozen, trained = (
        tuple(Bound(name, *places[tensor]) for name, tensor in names.items())
        for names in (graph.frozen, graph.trained)
    )
    return DepthModel(graph.depth, inside, frozen, trained)


def _generate(python: Path, folder: Path, models: Sequence[DepthModel]) -> None:
    jobs = [
        {
            "folder": str(folder / model.folder),
            "forward": str(folder / model.folder / "forward.onnx"),
            "trained": [bound.name for bound in model.trained],
        }
        for model in models
    ]
    done = subprocess.run(
        [str(python), "-I", str(_SCRIPT)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ExportError(_failure(done.stderr))


def _failure(stderr: str) -> str:
    last = (stderr.strip().splitlines() or ["no message"])[-1]
    if "ModuleNotFoundError" in last or "ImportError" in last:
        return f"backend ort-training: {last}; its environment needs: {INSTALL}"
    return f"backend ort-training: onnxruntime-training 1.19.2 cannot differentiate this model: {last}"


def _checked_depths(depths: Sequence[int] | None, num_layers: int) -> list[int]:
    chosen = sorted(set(depths)) if depths else list(range(1, num_layers + 1))
    wrong = [str(depth) for depth in chosen if not 1 <= depth <= num_layers]
    if wrong:
        raise ExportError(f"depths {', '.join(wrong)}: the model has 1 to {num_layers} layers")
    return chosen if chosen[-1] == num_layers else [*chosen, num_layers]


def _check_loss(program: Program, sizes: tuple[int, int]) -> None:
    batch = program.make_batch(*sizes)
    with torch.no_grad():
        check_mean(program, program.logits(batch), batch[program.label_name])


def _check_alike(anatomy: Anatomy) -> None:
    """A model of k positions takes any k layers only if all are of one kind and get the same side inputs."""
    kinds, _ = group_kinds(anatomy)
    sides = {anatomy.side_indices(layer) for layer in range(len(anatomy.calls))}
    if len(kinds) > 1 or len(sides) > 1:
        raise ExportError(
            f"backend ort-training: {anatomy.path} has {len(kinds)} kinds of block and {len(sides)} sets of side inputs; "
            "whole-model graphs per depth need blocks that can take each other's places: use --backend onnx"
        )
