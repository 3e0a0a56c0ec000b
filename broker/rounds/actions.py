"""What a federation may decide: each is carried out durably, in order, before the next event."""

from typing import NamedTuple

from fleetune.broker.tasks import Note, Task
from fleetune.device_runtime.contracts.secure_sums.masking import Unmasking
from fleetune.device_runtime.contracts.wire import Message


class Enrol(NamedTuple):
    """Record these tasks of one round, before any of them is offered; the first time, the round opens."""

    tasks: tuple[Task, ...]


class Assign(NamedTuple):
    """Offer a task to its device, which has ``deadline_s`` for it; 0 for no deadline."""

    task: Task
    deadline_s: float = 0.0


class Close(NamedTuple):
    """Combine the accepted updates of a round into a version."""

    round: int
    version: int
    devices: tuple[str, ...]
    lost: tuple[str, ...] = ()
    """Devices that still owe their updates at the deadline."""
    unmasking: Unmasking | None = None
    """What takes the masks off their sum, where there are any."""


class Record(NamedTuple):
    """Keep a decision about the masks of a round."""

    round: int
    note: Note


class Tell(NamedTuple):
    """Send a device a message."""

    device_id: str
    message: Message


class Repeat(NamedTuple):
    """Give up what a round has so far: its updates are in no version, and its devices are asked anew."""

    round: int
    first: int
    """Position of the first task that counts."""


class Dismiss(NamedTuple):
    """Tell a device that it is not wanted."""

    device_id: str
    reason: str
    is_error: bool = True


class Finish(NamedTuple):
    """The job is over; tell the devices that are here."""

    reason: str
    devices: tuple[str, ...]


Action = Enrol | Assign | Close | Dismiss | Finish | Record | Tell | Repeat
