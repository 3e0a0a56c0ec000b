"""The backends: how sections become graph files. Adding one is one row here and one loader on the device."""

from collections.abc import Callable
from typing import NamedTuple

from device_runtime.tables import Table
from exporters import onnx_graphs
from exporters.graph_file import GraphFile
from exporters.sections import Section

Convert = Callable[..., dict[str, GraphFile]]


class Backend(NamedTuple):
    """Converters ``(section, *, sizes) -> graph files by purpose``, and the suffix of those files."""

    prelude: Callable[..., dict[str, GraphFile]]
    block: Callable[..., dict[str, GraphFile]]
    head: Callable[..., dict[str, GraphFile]]
    suffix: str


def convert_all(
    backend: Backend, prelude: Section, blocks: list[Section], head: Section, *, sizes: tuple[int, int]
) -> "Graphs":
    """Every section's graph files."""
    return Graphs(
        backend.prelude(prelude, sizes=sizes),
        [backend.block(section, sizes=sizes) for section in blocks],
        backend.head(head, sizes=sizes),
    )


class Graphs(NamedTuple):
    """Graph files by purpose: of the prelude, of each kind of block, of the head."""

    prelude: dict[str, GraphFile]
    kinds: list[dict[str, GraphFile]]
    head: dict[str, GraphFile]


BACKENDS = Table(
    "backend",
    {
        "onnx": Backend(
            onnx_graphs.prelude_graphs, onnx_graphs.block_graphs, onnx_graphs.head_graphs, ".onnx"
        ),
    },
)
