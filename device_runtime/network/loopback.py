"""An MQTT server in memory for one process without threads: what a simulation and the tests connect to."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.network.topic_tree import TopicTree

Disturb = Callable[[str, bytes], Iterable[bytes]]
"""(topic, payload) -> what is delivered in its place: nothing, the same twice, something else."""


class Loopback:
    """The server: exact topics and ``+``, retained messages, wills, restarts; a message costs what it reaches, not all."""

    def __init__(self, *, disturb: Disturb | None = None) -> None:
        self.disturb: Disturb = disturb or (lambda _, payload: (payload,))
        self._links: dict[LoopbackLink, None] = {}
        self._subscribers: TopicTree[LoopbackLink] = TopicTree()
        self._retained: dict[str, bytes] = {}
        self._retained_topics: TopicTree[str] = TopicTree()
        self._news: dict[LoopbackLink, None] = {}

    def connect(self, topics: Sequence[str], *, will: tuple[str, bytes] | None = None) -> "LoopbackLink":
        """Open a link that receives ``topics``; ``will`` = (topic, payload), retained on its loss."""
        link = LoopbackLink(self, topics, will)
        self._links[link] = None
        for topic in link.topics:
            self._subscribers.add(topic, link)
        self._greet(link)
        return link

    def restart(self) -> None:
        """Lose everything on its way; all links reconnect."""
        for link in self._links:
            for topic in [*link.extra]:
                link.unlisten(topic)
            link.inbox.clear()
            link.connections += 1
            self._greet(link)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver once to every link that wants the topic."""
        if retain:
            self._retain(topic, payload)
        for link in dict.fromkeys(self._subscribers.find(topic)):
            for arriving in self.disturb(topic, payload):
                self._deliver(link, topic, arriving)

    def lose(self, link: "LoopbackLink", *, will: bool) -> None:
        """Forget a link; with ``will`` as if its process had died."""
        if link not in self._links:
            return
        del self._links[link]
        self._news.pop(link, None)
        for topic in (*link.topics, *link.extra):
            self._subscribers.discard(topic, link)
        if will and link.will:
            self.publish(*link.will, retain=True)

    def subscribe(self, topic: str, link: "LoopbackLink") -> None:
        """Have a link receive one topic more; no retained message is sent of it."""
        if link in self._links:
            self._subscribers.add(topic, link)

    def unsubscribe(self, topic: str, link: "LoopbackLink") -> None:
        """Take that back."""
        self._subscribers.discard(topic, link)

    def take_news(self) -> list["LoopbackLink"]:
        """Return, once, the links that have connected, reconnected or been sent something since the last call."""
        found, self._news = list(self._news), {}
        return found

    def _retain(self, topic: str, payload: bytes) -> None:
        """Keep a message in place of the one before; an empty one clears the topic."""
        if payload:
            self._retained[topic] = payload
            self._retained_topics.add(topic, topic)
        elif self._retained.pop(topic, None) is not None:
            self._retained_topics.discard(topic, topic)

    def _greet(self, link: "LoopbackLink") -> None:
        self._news[link] = None
        found = (topic for wanted in link.topics for topic in self._retained_topics.find(wanted))
        for topic in dict.fromkeys(found):
            self._deliver(link, topic, self._retained[topic])

    def _deliver(self, link: "LoopbackLink", topic: str, payload: bytes) -> None:
        link.inbox.append((topic, payload))
        self._news[link] = None


class LoopbackLink:
    """A link of a :class:`Loopback`; see :class:`fleetune.device_runtime.network.connection.Connection`."""

    chunk_bytes = CHUNK_BYTES
    connected = True
    can_listen = True
    dropped = 0

    def __init__(self, server: Loopback, topics: Sequence[str], will: tuple[str, bytes] | None) -> None:
        self.inbox: deque[tuple[str, bytes]] = deque()
        self.topics = tuple(topics)
        self.extra: set[str] = set()
        """Topics listened to besides."""
        self.will = will
        self.connections = 1
        self.bytes_sent = 0
        self.bytes_received = 0
        self.messages_sent = 0
        self._server = server

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Deliver at once."""
        self.messages_sent += 1
        self.bytes_sent += len(payload)
        self._server.publish(topic, payload, retain=retain)

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Next message, or None at once: in one thread waiting brings nothing."""
        if not self.inbox:
            return None
        topic, payload = self.inbox.popleft()
        self.bytes_received += len(payload)
        return topic, payload

    @property
    def bytes_taken(self) -> int:
        """The bytes received: they are counted when they are taken."""
        return self.bytes_received

    def is_unread(self, topic: str) -> bool:
        """Say no: what is received here is taken at once."""
        return False

    def listen(self, topic: str) -> None:
        """Receive one topic more."""
        self.extra.add(topic)
        self._server.subscribe(topic, self)

    def unlisten(self, topic: str) -> None:
        """Receive it no longer."""
        self.extra.discard(topic)
        self._server.unsubscribe(topic, self)

    @property
    def messages_acknowledged(self) -> int:
        """All: what is published is there at once."""
        return self.messages_sent

    def close(self) -> None:
        """Leave; the will is not sent."""
        self._server.lose(self, will=False)

    def kill(self) -> None:
        """Die; the will is sent."""
        self.connected = False
        self._server.lose(self, will=True)
