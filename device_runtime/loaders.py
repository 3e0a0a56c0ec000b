"""The graph loaders by backend; the stack chains what they open and never looks into a value."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from device_runtime import executorch_graphs, graphs
from device_runtime.arrays import Array
from device_runtime.errors import ArtifactError
from device_runtime.tables import Table

Value = Any
"""What a loader's graphs take and give; opaque."""


class OpenGraph(Protocol):
    """One opened graph."""

    def run(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """Run it: ``feeds`` by name in the order of the ports, ``wanted`` the names of all outputs."""
        ...


class Loader(NamedTuple):
    """How one runtime opens graphs ``open(path, threads)`` and holds values."""

    open: Callable[[Path, int], OpenGraph]
    value_of: Callable[[Array], Value]
    array_of: Callable[[Value], Array]
    set_threads: Callable[[int], None]


def _onnx(path: Path, threads: int) -> OpenGraph:
    return graphs.OnnxGraph(path, threads=threads)


def _executorch(path: Path, _threads: int) -> OpenGraph:
    return executorch_graphs.ExecutorchGraph(path)


def _whole_models(path: Path, _threads: int) -> OpenGraph:
    """The files of this backend are models of whole steps, which ``device_runtime.ort_training`` runs."""
    raise ArtifactError(f"{path}: no graph of a block; open this artifact with OrtTrainingStack")


LOADERS = Table(
    "backend that this device can run",
    {
        "onnx": Loader(_onnx, graphs.value_of, graphs.array_of, graphs.set_threads),
        "ort-training": Loader(_whole_models, graphs.value_of, graphs.array_of, graphs.set_threads),
        "executorch": Loader(
            _executorch, executorch_graphs.value_of, executorch_graphs.array_of, executorch_graphs.set_threads
        ),
    },
)
