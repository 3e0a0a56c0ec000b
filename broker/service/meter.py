"""What a job costs and carries, booked in its store under the round that it is spent on."""

import msgspec

from fleetune.broker.service.freight import DOWN, UP, Freight
from fleetune.broker.store.store import ByKind, Cost, Store
from fleetune.device_runtime.contracts.wire import Chunk, Message
from fleetune.device_runtime.network.connection import Connection


class Meter:
    """Counts chunks and reads the link's counters; ``spend`` books what has come together since the last time."""

    def __init__(self, link: Connection, store: Store, *, bucket: int, now: float) -> None:
        """Begin to count with what was not taken from the link yet.

        ``bucket`` is a round, 0 before the first, or ``store.AFTERWARDS``.
        """
        self._link, self._store, self._bucket = link, store, bucket
        self._cost, self._since = Cost(), now
        self._seen = (link.bytes_sent, link.bytes_taken)
        self._freight, self._read = Freight(), link.bytes_taken

    def count(self, *, down: int = 0, up: int = 0) -> None:
        """Bytes of chunks sent to a device, or received from one."""
        cost = self._cost
        self._cost = msgspec.structs.replace(
            cost, bytes_down=cost.bytes_down + down, bytes_up=cost.bytes_up + up
        )

    def sent(self, device_id: str, message: Message, size_bytes: int) -> None:
        """A message to a device, or to all of them (no name), has left in so many bytes; none if there was no connection."""
        self._freight.message(device_id, DOWN, size_bytes)
        if isinstance(message, Chunk) and size_bytes:
            self._freight.data(device_id, DOWN, message.sha256, len(message.data))

    def received(self, device_id: str, size_bytes: int) -> None:
        """A message of a device has come, whatever it is; without a name of nobody known."""
        self._read += size_bytes
        self._freight.message(device_id, UP, size_bytes)

    def chunk(self, device_id: str, chunk: Chunk) -> None:
        """The message that was received is a chunk."""
        self.count(up=len(chunk.data))
        self._freight.data(device_id, UP, chunk.sha256, len(chunk.data))

    def knows(self, sha256: str, sizes: ByKind) -> None:
        """What a transfer is made of."""
        self._freight.knows(sha256, sizes)

    def close(self, now: float) -> None:
        """Book all that is left, and what nobody has read, as nobody's; StateError as ``spend``."""
        unread = self._link.bytes_received - self._read
        self.received("", max(unread, 0))
        self.spend(now, all_of_it=True)

    def spend(self, now: float, *, all_of_it: bool = False) -> None:
        """Book what was spent until now; StateError if it cannot be written.

        Args:
            now: the time.
            all_of_it: also uploads that are not whole.
        """
        sent, received = self._link.bytes_sent, self._link.bytes_received
        cost = msgspec.structs.replace(
            self._cost,
            bytes_sent=sent - self._seen[0],
            bytes_received=received - self._seen[1],
            seconds=now - self._since,
        )
        self._store.spend(self._bucket, cost, self._freight.take(all_of_it=all_of_it))
        self._cost, self._since, self._seen = Cost(), now, (sent, received)

    def turn_to(self, bucket: int, now: float) -> None:
        """What is spent from now on goes to another bucket; nothing happens if it is the same."""
        if bucket != self._bucket:
            self.spend(now, all_of_it=True)
            self._bucket = bucket
