"""What a federation may decide: each is carried out durably, in order, before the next event."""

from typing import NamedTuple


class Ask(NamedTuple):
    """Record that these devices belong to a round; the first time, it opens."""

    round: int
    devices: tuple[str, ...]


class Send(NamedTuple):
    """Send a device an offer, to train in a round or to evaluate a version; ``position`` is its place."""

    device_id: str
    role: str
    round: int
    version: int
    position: int
    deadline_s: float


class Close(NamedTuple):
    """Combine the accepted updates of a round into version ``round``."""

    round: int
    devices: tuple[str, ...]


class Dismiss(NamedTuple):
    """Tell a device that it is not wanted."""

    device_id: str
    reason: str
    is_error: bool = True


class Finish(NamedTuple):
    """The job is over; tell the devices that are here."""

    reason: str
    devices: tuple[str, ...]


Action = Ask | Send | Close | Dismiss | Finish
