"""What every backend of block graphs hands to the writer: graph files, made by converters of one signature."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from fleetune.device_runtime.contracts.manifest import Port
from fleetune.exporters.model.sections import SectionFunction


@dataclass(frozen=True)
class GraphFile:
    """One graph ready to be written: its bytes, its ports in the order the file declares them, its largest batch and sequence."""

    content: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bounds: Mapping[str, int] = field(default_factory=dict)


GraphFiles = dict[str, GraphFile]
"""The graphs of one section by purpose."""


class Convert(Protocol):
    """Turns a section's function into graph files; ``sizes`` are the (batch, sequence) of its examples."""

    def __call__(
        self, section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32"
    ) -> GraphFiles:
        """Raise ExportError for what the backend cannot take, ``base_dtype`` included."""


class ConvertStep(Protocol):
    """Turns a function of new tokens, of the prelude or a block, into its one graph; ``sizes`` as in ``tracing.SIZES``."""

    def __call__(
        self, section: SectionFunction, *, sizes: Sequence[int], base_dtype: str = "fp32"
    ) -> GraphFile:
        """Raise ExportError for what the backend cannot take."""


class Converters(NamedTuple):
    """A backend's converters of the three sorts of section, and the suffix of their files.

    ``step`` converts what runs on new tokens alone; None where the backend has no such graphs.
    """

    prelude: Convert
    block: Convert
    head: Convert
    suffix: str
    step: ConvertStep | None = None


def smallest_bounds(sections: Iterable[GraphFiles]) -> dict[str, int]:
    """Largest batch and seq that every graph takes; empty if any will do."""
    found: dict[str, int] = {}
    for graph in (graph for files in sections for graph in files.values()):
        found |= {name: min(bound, found.get(name, bound)) for name, bound in graph.bounds.items()}
    return found
