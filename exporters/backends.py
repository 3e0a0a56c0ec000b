"""The backends: how sections become graph files. Adding one is one row here and one loader on the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fleetune.device_runtime.tables import Table
from fleetune.exporters.executorch import graphs as executorch_graphs
from fleetune.exporters.model.graph_file import GraphFile
from fleetune.exporters.model.sections import Section
from fleetune.exporters.onnx import graphs as onnx_graphs

Convert = Callable[..., dict[str, GraphFile]]


class Backend(NamedTuple):
    """Converters ``(section, *, sizes) -> graph files by purpose``, the suffix of those files, what frozen weights may be."""

    prelude: Callable[..., dict[str, GraphFile]]
    block: Callable[..., dict[str, GraphFile]]
    head: Callable[..., dict[str, GraphFile]]
    suffix: str
    base_dtypes: tuple[str, ...] = ("fp32",)


def convert_all(
    backend: Backend,
    prelude: Section,
    blocks: list[Section],
    head: Section,
    *,
    sizes: tuple[int, int],
    base_dtype: str = "fp32",
) -> "Graphs":
    """Every section's graph files; converters of a backend that takes more than fp32 are told ``base_dtype``."""
    options: dict[str, Any] = {"sizes": sizes}
    if base_dtype != "fp32":
        options["base_dtype"] = base_dtype
    return Graphs(
        backend.prelude(prelude, **options),
        [backend.block(section, **options) for section in blocks],
        backend.head(head, **options),
    )


class Graphs(NamedTuple):
    """Graph files by purpose: of the prelude, of each kind of block, of the head."""

    prelude: dict[str, GraphFile]
    kinds: list[dict[str, GraphFile]]
    head: dict[str, GraphFile]

    @property
    def bounds(self) -> dict[str, int]:
        """Largest batch and seq that every graph takes; empty if any will do."""
        found: dict[str, int] = {}
        for graph in (g for part in (self.prelude, *self.kinds, self.head) for g in part.values()):
            found |= {name: min(bound, found.get(name, bound)) for name, bound in graph.bounds.items()}
        return found


BACKENDS = Table(
    "backend",
    {
        "onnx": Backend(
            onnx_graphs.prelude_graphs,
            onnx_graphs.block_graphs,
            onnx_graphs.head_graphs,
            ".onnx",
            ("fp32", "fp16", "int8"),
        ),
        "executorch": Backend(
            executorch_graphs.prelude_graphs,
            executorch_graphs.block_graphs,
            executorch_graphs.head_graphs,
            ".pte",
        ),
    },
)
