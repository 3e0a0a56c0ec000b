"""How a runtime opens graphs and holds values; the stack chains what a loader opens and never looks into a value."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.engine import executorch_graphs, onnx_graphs
from fleetune.device_runtime.errors import ConfigError

Value = Any
"""What a loader's graphs take and give; opaque."""


class OpenGraph(Protocol):
    """One opened graph."""

    def run(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """Run it: ``feeds`` by name in the order of the ports, ``wanted`` the names of all outputs."""
        ...


class Loader(NamedTuple):
    """One runtime."""

    open: Callable[[Path, int], OpenGraph]
    """(file, threads that share the work of each operator); opened for 1, several threads may run it at once if ``in_lanes``."""
    value_of: Callable[[Array], Value]
    array_of: Callable[[Value], Array]
    in_lanes: bool = False
    """Whether its graphs may be run by several threads at once."""
    stop: Callable[[bool], object] = lambda is_stopped: None
    """Make all that its graphs run fail soon, or let them run again; of a runtime that cannot be stopped nothing."""
    open_growing: Callable[[Path, int], OpenGraph] | None = None
    """As ``open``, for a graph whose values are a little larger in every run; None where that makes no difference."""


def onnx_loader(threads: int, provider: str) -> Loader:
    """Load by onnxruntime.

    Raises:
        ConfigError: ``threads`` below 0, or a provider that is not there.
        UnknownName: a provider that nobody knows.
    """
    chosen = onnx_graphs.find_provider(provider)
    onnx_graphs.check_threads(threads)
    run = onnx_graphs.run_options()
    return Loader(
        partial(onnx_graphs.OnnxGraph, provider=chosen, run=run),
        partial(onnx_graphs.value_of, device=chosen.device),
        onnx_graphs.array_of,
        in_lanes=provider == "cpu",
        stop=partial(setattr, run, "terminate"),
        open_growing=partial(onnx_graphs.OnnxGraph, provider=chosen, grows=True, run=run),
    )


def executorch_loader(threads: int, provider: str) -> Loader:
    """Load by ExecuTorch, whose one pool of ``threads`` is the process's; ConfigError as :func:`onnx_loader`."""
    check_cpu("executorch", provider)
    executorch_graphs.set_threads(threads)
    opened = executorch_graphs
    return Loader(lambda path, _: opened.ExecutorchGraph(path), opened.value_of, opened.array_of)


def check_cpu(backend: str, provider: str) -> None:
    """Raise ConfigError for any provider but ``cpu``."""
    if provider != "cpu":
        raise ConfigError(f"provider {provider}: the {backend} backend runs on cpu")
