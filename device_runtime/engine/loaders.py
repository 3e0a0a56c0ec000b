"""The graph loaders by backend; the stack chains what they open and never looks into a value."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.engine import executorch_graphs
from fleetune.device_runtime.engine import onnx_graphs as graphs
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.tables import Table

Value = Any
"""What a loader's graphs take and give; opaque."""


class OpenGraph(Protocol):
    """One opened graph."""

    def run(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """Run it: ``feeds`` by name in the order of the ports, ``wanted`` the names of all outputs."""
        ...


class Loader(NamedTuple):
    """How one runtime opens graphs and holds values."""

    open: Callable[[Path], OpenGraph]
    value_of: Callable[[Array], Value]
    array_of: Callable[[Value], Array]
    open_alone: Callable[[Path], OpenGraph] | None = None
    """The same for a graph that runs on the thread that calls, several of which may call at once."""
    may_run_alone: Callable[[], bool] = lambda: False
    """Whether that way is open now."""


def _onnx(threads: int, provider: str) -> Loader:
    chosen = graphs.find_provider(provider)
    graphs.check_threads(threads)
    return Loader(
        partial(graphs.OnnxGraph, threads=threads, provider=chosen),
        partial(graphs.value_of, device=chosen.device),
        graphs.array_of,
        partial(graphs.OnnxGraph, alone=True),
        lambda: provider == "cpu" and graphs.may_run_alone(),
    )


def _executorch(threads: int, provider: str) -> Loader:
    _only_cpu("executorch", provider)
    executorch_graphs.set_threads(threads)
    opened = executorch_graphs
    return Loader(opened.ExecutorchGraph, opened.value_of, opened.array_of)


def _ort_training(threads: int, provider: str) -> Loader:
    _only_cpu("ort-training", provider)
    graphs.check_threads(threads)
    return Loader(_whole_models, graphs.value_of, graphs.array_of)


def _whole_models(path: Path) -> OpenGraph:
    """The files of this backend are models of whole steps, which ``fleetune.device_runtime.engine.ort_training`` runs."""
    raise ArtifactError(f"{path}: no graph of a block; open this artifact with OrtTrainingStack")


def _only_cpu(backend: str, provider: str) -> None:
    if provider != "cpu":
        raise ConfigError(f"provider {provider}: the {backend} backend runs on cpu")


LOADERS: Table[Callable[[int, str], Loader]] = Table(
    "backend that this device can run",
    {"onnx": _onnx, "ort-training": _ort_training, "executorch": _executorch},
)
"""``(threads, provider) -> Loader``; the size of a thread pool counts for the whole process."""
