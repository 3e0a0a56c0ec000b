"""What every backend hands to the writer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetune.device_runtime.contracts.manifest import Port


@dataclass(frozen=True)
class GraphFile:
    """One graph ready to be written: its bytes, its ports in the order the file declares them, its largest batch and sequence."""

    content: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    bounds: Mapping[str, int] = field(default_factory=dict)
