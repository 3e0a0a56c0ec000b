"""A fleet at one moment, as plain data: what the table, the page and the metrics show."""

import msgspec

from fleetune.device_runtime.contracts.wire import RoundFigures


class DeviceState(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Everything is its own word, but for what is reckoned from when it was heard."""

    device_id: str
    state: str
    """The first that holds of STATES, else its phase."""
    why: str = ""
    """In words, of the states that have a reason."""
    is_online: bool
    is_paused: bool = False
    is_silent: bool = False
    """It is connected and has told nothing for three times as long as it should."""
    is_late: bool = False
    """Its round closes before it can be done, at its pace."""
    is_slow: bool = False
    """Its steps take more than SLOW times the median of those that train."""
    phase: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    step_s: float = 0.0
    left_s: float = 0.0
    memory_mb: float = 0.0
    temperature_c: float = 0.0
    mb_sent: float = 0.0
    mb_received: float = 0.0
    software: str = ""
    said: str = ""
    heard_s: float = 0.0
    """Seconds since it was heard."""


class JobState(msgspec.Struct, frozen=True, kw_only=True):
    """The job and its aggregator."""

    job: str
    aggregator: str
    """``here``, ``away``, ``finished`` or ``unknown``."""
    is_told: bool = False
    """Whether the aggregator answers who looks; one before this release does not."""
    software: str = ""
    round: int = 0
    num_rounds: int = 0
    """In all; 0 where that is not known."""
    version: int = 0
    is_open: bool = False
    left_s: float = 0.0
    num_pending: int = 0
    num_accepted: int = 0
    num_refused: int = 0
    pending: list[str] = []
    dropped: int = 0


class FleetState(msgspec.Struct, frozen=True, kw_only=True):
    """A fleet at one moment."""

    job: JobState
    counts: dict[str, int]
    """Devices by state."""
    devices: list[DeviceState]
    """By name."""
    rounds: list[RoundFigures]
    """In order; the newest that are kept."""
    tell_every_s: float = 0.0
    """How often devices that work say what they are at."""


STATES = ("gone", "paused", "silent", "late", "slow", "left out", "refused")
"""What is told of a device in the place of its phase, the first that holds."""
SLOW = 2.5
