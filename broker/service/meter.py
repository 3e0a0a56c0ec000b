"""What a job costs, booked in its store under the round that it is spent on."""

import msgspec

from fleetune.broker.store.store import Cost, Store
from fleetune.device_runtime.network.connection import Connection


class Meter:
    """Counts chunks and reads the link's counters; ``spend`` books what has come together since the last time."""

    def __init__(self, link: Connection, store: Store, *, bucket: int, now: float) -> None:
        """Begin to count; ``bucket`` is a round, 0 before the first, or ``store.AFTERWARDS``."""
        self._link, self._store, self._bucket = link, store, bucket
        self._cost, self._since = Cost(), now
        self._seen = (link.bytes_sent, link.bytes_received)

    def count(self, *, down: int = 0, up: int = 0) -> None:
        """Bytes of chunks sent to a device, or received from one."""
        cost = self._cost
        self._cost = msgspec.structs.replace(
            cost, bytes_down=cost.bytes_down + down, bytes_up=cost.bytes_up + up
        )

    def spend(self, now: float) -> None:
        """Book what was spent until now; StateError if it cannot be written."""
        sent, received = self._link.bytes_sent, self._link.bytes_received
        cost = msgspec.structs.replace(
            self._cost,
            bytes_sent=sent - self._seen[0],
            bytes_received=received - self._seen[1],
            seconds=now - self._since,
        )
        self._store.spend(self._bucket, cost)
        self._cost, self._since, self._seen = Cost(), now, (sent, received)

    def turn_to(self, bucket: int, now: float) -> None:
        """What is spent from now on goes to another bucket; nothing happens if it is the same."""
        if bucket != self._bucket:
            self.spend(now)
            self._bucket = bucket
