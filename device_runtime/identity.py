"""Who a device is on the wire, and what happens to it that a person may want to see."""

from collections.abc import Mapping
from typing import NamedTuple

from device_runtime.errors import one_line
from device_runtime.wire import DeviceStatus, aggregator_topic, device_topic, encode


class Identity(NamedTuple):
    """Who a device is, to whom."""

    device_id: str
    job: str
    artifact: str
    """SHA-256 of the artifact's manifest."""
    role: str = "train"

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

    def status(self, *, online: bool, paused: str = "") -> bytes:
        """An encoded DeviceStatus."""
        return encode(DeviceStatus(device_id=self.device_id, online=online, paused=one_line(paused)))


class Event(NamedTuple):
    """Something that a person may want to see.

    ``kind`` is offer, step, paused, resumed, trained, evaluated, accepted, refused, declined or finished; the rest
    depends on it.
    """

    kind: str
    round: int
    values: Mapping[str, float] = {}
    text: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.values.items())
        kind = "" if self.kind in self.values else self.kind  # "step 12, ..." says that it is a step
        return f"round {self.round}: " + ": ".join(filter(None, (kind, values, self.text)))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
