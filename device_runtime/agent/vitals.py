"""How the machine of a device does."""

from typing import NamedTuple


class Vitals(NamedTuple):
    """0 stands for what cannot be read."""

    memory_mb: float = 0.0
    """Resident memory of the process, 10^6 bytes."""
    temperature_c: float = 0.0
    """Of the hottest part that can be read, degrees Celsius."""
