"""What every backend hands to the writer."""

from dataclasses import dataclass

from device_runtime.manifest import Port


@dataclass(frozen=True)
class GraphFile:
    """One graph ready to be written: its bytes, and its ports in the order the file declares them."""

    content: bytes
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
