"""Who a device is on the wire, and what for."""

from typing import Annotated, Any, NamedTuple

import msgspec

from fleetune.device_runtime.contracts.wire import (
    ROLES,
    Decline,
    DeviceStatus,
    Offer,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.errors import WireError, one_line
from fleetune.device_runtime.options import Option


class Duty(msgspec.Struct, frozen=True, kw_only=True):
    """What a device is in a job for, and how it goes about it."""

    role: Annotated[str, Option("what this device is in the job for", choices=ROLES)] = "train"
    checkpoint_every: Annotated[int, Option("steps between checkpoints", at_least=1)] = 20
    idle_limit_s: Annotated[
        float, Option("seconds to wait for a word of the aggregator; 0 for ever", at_least=0)
    ] = 0.0
    account: Annotated[
        str,
        Option(
            "folder of the account of what the data has spent under dp sample: one for all jobs on the same data; without it the "
            "state folder",
            metavar="DIR",
        ),
    ] = ""
    tell_labels: Annotated[
        bool,
        Option(
            "tell an aggregator that asks how many samples here are of which class, or never do",
            off="keep-labels",
        ),
    ] = False
    class_weights: Annotated[
        str,
        Option(
            "weights of the classes in this device's training loss, in the place of the job's: balanced, or a=2,b=1, 1 for "
            "the others",
        ),
    ] = ""
    tell_progress: Annotated[
        bool,
        Option(
            "while somebody watches the job, tell step, pace, memory, temperature and bytes, or never do",
            off="keep-progress",
        ),
    ] = True


class Identity(NamedTuple):
    """Who a device is, to whom."""

    device_id: str
    job: str
    artifact: str
    """SHA-256 of the artifact's manifest."""
    role: str = "train"
    session: str = ""
    """Of this start of its process; empty where nobody else can be connected as this device."""

    @property
    def topics(self) -> list[str]:
        """What it subscribes to."""
        return [device_topic(self.job, self.device_id, "down"), aggregator_topic(self.job)]

    @property
    def up(self) -> str:
        """Where it publishes what the aggregator is to read."""
        return device_topic(self.job, self.device_id, "up")

    @property
    def will(self) -> tuple[str, bytes]:
        """Its last will: (topic, payload), to be retained."""
        return device_topic(self.job, self.device_id, "status"), self.status(online=False)

    def status(self, *, online: bool, paused: str = "", **more: Any) -> bytes:
        """An encoded DeviceStatus; ``more`` are fields that say what it is at."""
        status = DeviceStatus(
            device_id=self.device_id, online=online, paused=one_line(paused), session=self.session, **more
        )
        return encode(status)

    def decline(self, offer: Offer, reason: str, *, cause: str = "") -> bytes:
        """An encoded Decline."""
        decline = Decline(
            device_id=self.device_id,
            job=self.job,
            task_id=offer.task_id,
            round=offer.round,
            reason=reason,
            cause=cause,
        )
        return encode(decline)

    def is_of_namesake(self, payload: bytes) -> bool:
        """Whether a status under this device's topic says that another process is online as this device."""
        status = _status(payload)
        return status is not None and status.online and status.session != self.session

    def is_foreign(self, payload: bytes) -> bool:
        """Whether a status under this device's topic is another process's, online or gone."""
        status = _status(payload)
        return status is not None and status.session != self.session


def _status(payload: bytes) -> DeviceStatus | None:
    try:
        status = decode(payload)
    except WireError:
        return None
    return status if isinstance(status, DeviceStatus) else None
