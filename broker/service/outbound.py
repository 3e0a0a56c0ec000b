"""What an aggregator says: messages to devices, and its own retained status; signed, if it has a key."""

from collections.abc import Callable, Iterable

from fleetune.broker.rounds.federation import Federation
from fleetune.broker.service.freight import SHARED
from fleetune.broker.service.meter import Meter
from fleetune.broker.store.store import Store
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Message,
    View,
    aggregator_topic,
    device_topic,
    encode,
    shared_topic,
)
from fleetune.device_runtime.network.connection import Connection, send
from fleetune.device_runtime.network.underway import Underway

Seal = Callable[[str, bytes], bytes]
"""(topic, payload) -> the payload, signed."""


def unsigned(topic: str, payload: bytes) -> bytes:
    """Leave a message as it is: the aggregator has no key."""
    return payload


class Outbound:
    """The mouth of one job; what is lost is asked for again, or announced again."""

    def __init__(
        self,
        link: Connection,
        store: Store,
        federation: Federation,
        *,
        session: str,
        meter: Meter,
        seal: Seal = unsigned,
    ) -> None:
        self._meter, self._seal = meter, seal
        self._link, self._store, self._federation, self.session = link, store, federation, session
        self.tell_every_s = 0.0
        """How often devices are to say what they are at; 0 while nobody looks."""
        self._underway = Underway(link)
        self._job = federation.settings.job
        self.topic = aggregator_topic(self._job)
        """Of its status."""

    @property
    def chunk_bytes(self) -> int:
        """Largest chunk payload that fits a message here."""
        return self._link.chunk_bytes

    @property
    def mask_group(self) -> str:
        """Name of those who mask together in the open round; empty where nobody does."""
        masks = self._federation.rounds.masks
        return masks.group if masks else ""

    def is_unread(self, device_id: str) -> bool:
        """Whether what a device said waits to be taken."""
        return self._link.is_unread(device_topic(self._job, device_id, "up"))

    def tell(self, device_id: str, message: Message) -> bool:
        """Send a device a message; False if there is no connection."""
        return self._send(device_id, device_topic(self._job, device_id, "down"), message)

    def serve(self, device_id: str, chunk: Chunk) -> bool:
        """Send a device a chunk, unless the same is on its way to the server or there is no connection; True if sent."""
        key = (device_id, chunk.sha256, chunk.index, len(chunk.data))
        return self._underway.once(key, lambda: self.tell(device_id, chunk))

    def publish(self, stream: str, part: int, chunk: Chunk) -> bool:
        """Send a chunk to all who listen to a part of a stream; False if there is no connection."""
        return self._send(SHARED, shared_topic(self._job, stream, part), chunk)

    def announce(self, *, online: bool = True) -> None:
        """Publish the aggregator's status, retained; the job is over once its store says so."""
        status = AggregatorStatus(
            job=self._job,
            session=self.session,
            online=online,
            round=self._federation.round,
            version=self._federation.version,
            finished=self._store.finished,
            tell_every_s=self.tell_every_s if online else 0.0,
        )
        self._send("", self.topic, status, retain=True)

    def show(self, view: View) -> None:
        """Answer whoever looks, not retained."""
        self._send("", aggregator_topic(self._job, "view"), view)

    def clear(self, devices: Iterable[str]) -> None:
        """Take the retained statuses of devices from the server."""
        for device_id in devices:
            send(self._link, device_topic(self._job, device_id, "status"), b"", retain=True)

    def _send(self, device_id: str, topic: str, message: Message, *, retain: bool = False) -> bool:
        before = self._link.bytes_sent
        payload = encode(message)
        if not isinstance(message, Chunk):  # its digest is in a signed offer
            payload = self._seal(topic, payload)
        is_sent = send(self._link, topic, payload, retain=retain)
        self._meter.sent(device_id, message, self._link.bytes_sent - before)
        return is_sent
