"""A device's link in virtual time: what is sent arrives when the link is free, after its bytes and the latency."""

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Generic, NamedTuple, TypeVar

from fleetune.device_runtime.network.loopback import LoopbackLink

T = TypeVar("T")
Rates = Callable[[float], tuple[float, float]]
"""Time in seconds -> (down, up) in bytes a second, both above 0."""


class Line(NamedTuple):
    """What a device is connected by; by default without limit."""

    bandwidth: Rates = lambda _: (inf, inf)
    latency_s: float = 0.0


class Way(Generic[T]):
    """One direction: one thing after the other, at the rate that holds when its first byte leaves."""

    def __init__(self, rate: Callable[[float], float], latency_s: float) -> None:
        self._rate, self._latency_s = rate, latency_s
        self.held_until = -inf
        """Nothing leaves before."""
        self._free_at = -inf
        self._flying: deque[tuple[float, T]] = deque()

    def send(self, thing: T, *, size_bytes: int, now: float) -> None:
        """Put it on its way."""
        start = max(now, self._free_at, self.held_until)
        self._free_at = start + size_bytes / self._rate(start)
        self._flying.append((self._free_at + self._latency_s, thing))

    def __len__(self) -> int:
        """How much is on its way."""
        return len(self._flying)

    @property
    def due_at(self) -> float:
        """Time at which the next arrives; inf for none."""
        return self._flying[0][0] if self._flying else inf

    @property
    def last_at(self) -> float:
        """Time at which the last arrives; -inf for none."""
        return self._flying[-1][0] if self._flying else -inf

    def take(self, now: float) -> T | None:
        """The next that has arrived, or None."""
        return self._flying.popleft()[1] if self.due_at <= now else None


class TimedLink:
    """A :class:`fleetune.device_runtime.network.connection.Connection` over a loopback, with time; ``move`` moves it."""

    can_listen = False
    """Each device's downloads take the time of its own line, whoever else is sent the same."""

    def __init__(self, inner: LoopbackLink, line: Line, *, clock: Callable[[], float]) -> None:
        """Wrap ``inner``; ``clock`` gives the virtual time in seconds."""
        self.bytes_sent = 0
        self.bytes_received = 0
        self.messages_sent = 0
        self._inner, self._clock = inner, clock
        self._down: Way[tuple[str, bytes]] = Way(lambda t: line.bandwidth(t)[0], line.latency_s)
        self._up: Way[tuple[str, bytes, bool]] = Way(lambda t: line.bandwidth(t)[1], line.latency_s)

    @property
    def connected(self) -> bool:
        """Whether the device is there."""
        return self._inner.connected

    @property
    def connections(self) -> int:
        """As of the loopback."""
        return self._inner.connections

    @property
    def chunk_bytes(self) -> int:
        """As of the loopback."""
        return self._inner.chunk_bytes

    @property
    def bytes_taken(self) -> int:
        """The bytes received: they are counted when they are taken."""
        return self.bytes_received

    def is_unread(self, topic: str) -> bool:
        """As of the loopback."""
        return self._inner.is_unread(topic)

    @property
    def messages_acknowledged(self) -> int:
        """How many of the messages published have arrived."""
        return self.messages_sent - len(self._up)

    @property
    def dropped(self) -> int:
        """None."""
        return self._inner.dropped

    @property
    def due_at(self) -> float:
        """Time at which something arrives at either end."""
        return min(self._down.due_at, self._up.due_at)

    @property
    def sent_by(self) -> float:
        """Time at which all that was published has arrived."""
        return max(self._up.last_at, self._clock())

    def hold(self, until: float) -> None:
        """Let nothing that is published from now on leave before a time."""
        self._up.held_until = until

    def has_mail(self, now: float) -> bool:
        """Whether ``receive`` has a message."""
        return self._down.due_at <= now

    def listen(self, topic: str) -> None:
        """Do nothing: nobody asks for it."""

    def unlisten(self, topic: str) -> None:
        """Do nothing."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Put a message on its way to the server."""
        self.messages_sent += 1
        self.bytes_sent += len(payload)
        self._up.send((topic, payload, retain), size_bytes=len(payload), now=self._clock())

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Next message that has arrived, or None at once."""
        message = self._down.take(self._clock())
        if message:
            self.bytes_received += len(message[1])
        return message

    def move(self, now: float) -> None:
        """Hand the server what has arrived there, and put what it sends on its way."""
        while (sent := self._up.take(now)) is not None:
            topic, payload, retain = sent
            self._inner.publish(topic, payload, retain=retain)
        while (message := self._inner.receive(0.0)) is not None:
            self._down.send(message, size_bytes=len(message[1]), now=now)
