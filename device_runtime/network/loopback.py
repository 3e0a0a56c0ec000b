"""An MQTT server in memory for one process without threads: what a simulation and the tests connect to."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fleetune.device_runtime.contracts.wire import CHUNK_BYTES

Disturb = Callable[[str, bytes], Iterable[bytes]]
"""(topic, payload) -> what is delivered in its place: nothing, the same twice, something else."""


class Loopback:
    """The server: exact topics and ``+``, retained messages, wills, restarts."""

    def __init__(self, *, disturb: Disturb | None = None) -> None:
        self.disturb: Disturb = disturb or (lambda _, payload: (payload,))
        self._links: list[LoopbackLink] = []
        self._retained: dict[str, bytes] = {}

    def connect(self, topics: Sequence[str], *, will: tuple[str, bytes] | None = None) -> "LoopbackLink":
        """Open a link that receives ``topics``; ``will`` = (topic, payload), retained on its loss."""
        link = LoopbackLink(self, topics, will)
        self._links.append(link)
        self._send_retained(link)
        return link

    def restart(self) -> None:
        """Lose everything on its way; all links reconnect."""
        for link in self._links:
            link.inbox.clear()
            link.connections += 1
            self._send_retained(link)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver to every link that wants the topic."""
        if retain:
            self._retained[topic] = payload
        for link in self._links:
            if link.wants(topic):
                link.inbox.extend((topic, p) for p in self.disturb(topic, payload))

    def lose(self, link: "LoopbackLink", *, will: bool) -> None:
        """Forget a link; with ``will`` as if its process had died."""
        if link not in self._links:
            return
        self._links.remove(link)
        if will and link.will:
            self.publish(*link.will, retain=True)

    def _send_retained(self, link: "LoopbackLink") -> None:
        link.inbox.extend((t, p) for t, p in self._retained.items() if link.wants(t))


class LoopbackLink:
    """A link of a :class:`Loopback`; see :class:`fleetune.device_runtime.network.connection.Connection`."""

    chunk_bytes = CHUNK_BYTES
    connected = True

    def __init__(self, server: Loopback, topics: Sequence[str], will: tuple[str, bytes] | None) -> None:
        self.inbox: deque[tuple[str, bytes]] = deque()
        self.will = will
        self.connections = 1
        self.bytes_sent = 0
        self.bytes_received = 0
        self._server = server
        self._patterns = [topic.split("/") for topic in topics]

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Deliver at once."""
        self.bytes_sent += len(payload)
        self._server.publish(topic, payload, retain=retain)

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Next message, or None at once: in one thread waiting brings nothing."""
        if not self.inbox:
            return None
        topic, payload = self.inbox.popleft()
        self.bytes_received += len(payload)
        return topic, payload

    def wants(self, topic: str) -> bool:
        """Whether it is subscribed to ``topic``."""
        parts = topic.split("/")
        return any(_matches(pattern, parts) for pattern in self._patterns)

    def close(self) -> None:
        """Leave; the will is not sent."""
        self._server.lose(self, will=False)

    def kill(self) -> None:
        """Die; the will is sent."""
        self.connected = False
        self._server.lose(self, will=True)


def _matches(pattern: list[str], parts: list[str]) -> bool:
    return len(pattern) == len(parts) and all(
        p in ("+", part) for p, part in zip(pattern, parts, strict=True)
    )
