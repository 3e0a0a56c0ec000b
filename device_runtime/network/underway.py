"""What was handed to a link and has not left this side yet: asked for again, it need not be sent again."""

from collections.abc import Callable, Hashable

from fleetune.device_runtime.network.connection import Connection


class Underway:
    """Remembers what was published over one link until the server has acknowledged it, or the connection is lost."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._numbers: dict[Hashable, int] = {}
        """Which message of the link a thing is, the oldest first."""

    def has(self, thing: Hashable) -> bool:
        """Whether this is still on its way to the server."""
        self._tidy()
        return thing in self._numbers

    def once(self, thing: Hashable, send: Callable[[], bool]) -> bool:
        """Send a thing, in one message, unless it is still on its way; True if it was sent now."""
        if self.has(thing) or not send():
            return False
        self.add(thing)
        return True

    def add(self, thing: Hashable) -> None:
        """Take note that the message published last is this."""
        self._numbers.pop(thing, None)
        self._numbers[thing] = self._link.messages_sent

    def _tidy(self) -> None:
        acknowledged = self._link.messages_acknowledged
        while self._numbers and self._numbers[oldest := next(iter(self._numbers))] <= acknowledged:
            del self._numbers[oldest]
