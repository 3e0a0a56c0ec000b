"""What an agent and an aggregator need of a connection, be it a link to a real server or one in memory."""

import logging
from typing import Protocol

from fleetune.device_runtime.errors import TransportError

log = logging.getLogger(__name__)


class Connection(Protocol):
    """What an agent and an aggregator need of a link."""

    @property
    def connected(self) -> bool:
        """Whether the connection stands now."""

    @property
    def connections(self) -> int:
        """How often it (re)connected; after a change everything has to be announced again."""

    @property
    def chunk_bytes(self) -> int:
        """Largest chunk payload that fits a message here."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes published."""

    @property
    def messages_sent(self) -> int:
        """Messages published."""

    @property
    def messages_acknowledged(self) -> int:
        """How many of them, the oldest, are with the server, or lost with a connection."""

    @property
    def dropped(self) -> int:
        """Messages received and thrown away: more came than could be taken."""

    @property
    def bytes_received(self) -> int:
        """Payload bytes received."""

    @property
    def bytes_taken(self) -> int:
        """Payload bytes that ``receive`` has given out."""

    @property
    def can_listen(self) -> bool:
        """Whether ``listen`` is of any use: it is not on a link that knows one way only, or where the server refuses it."""

    def is_unread(self, topic: str) -> bool:
        """Whether a message of who speaks on a topic was received and not taken yet, as far as this side knows."""

    def listen(self, topic: str) -> None:
        """Subscribe to one topic more, until ``unlisten`` or the end of the connection, and do not wait for the answer."""

    def unlisten(self, topic: str) -> None:
        """Take back a ``listen``; what is on its way still comes."""

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at least once; TransportError if there is no room, or it is too large for the server."""

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Next message as (topic, payload), or None: if none comes in time, or at once after a reconnection."""


def send(link: Connection, topic: str, payload: bytes, *, retain: bool = False) -> bool:
    """Publish if the connection stands, else drop: whoever needs the message asks or announces again. False if dropped."""
    if not link.connected:
        return False
    try:
        link.publish(topic, payload, retain=retain)
    except TransportError as exc:
        log.warning("a message on %s is lost: %s", topic, exc)
        return False
    return True
