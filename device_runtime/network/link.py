"""One MQTT connection: MQTT 5 where the server has it, 3.1.1 otherwise; plain, TLS or WebSocket; QoS 1.

Paho's thread serves keep-alive, reconnects, subscribes again, and only fills one bounded mailbox. No session is relied
upon: messages may get lost, and :attr:`Link.connections` tells when to announce oneself again.
"""

import logging
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from fleetune.device_runtime.contracts.fields import CHUNK_BYTES, MESSAGE_BYTES_MAX
from fleetune.device_runtime.contracts.transfer import CHUNK_BYTES_MIN
from fleetune.device_runtime.errors import ConfigError, TransportError, one_line
from fleetune.device_runtime.network.address import Address, Reach, parse_url
from fleetune.device_runtime.network.client import HEADER_BYTES, Client
from fleetune.device_runtime.network.hooks import NOBODY, Hooks, Party
from fleetune.device_runtime.network.mailbox import Mailbox
from fleetune.device_runtime.network.tls import Context, make_context

log = logging.getLogger(__name__)

QUEUED_MAX = 64
"""Messages published and not yet acknowledged by the server."""
PATIENCE_S = 15.0
"""How long ``publish`` waits for room among them."""
NUM_GOOD = 64
"""After so many messages that went through since a connection broke under a chunk, chunks grow again."""


class Will(NamedTuple):
    """What the server publishes, retained, when this side vanishes without :meth:`Link.close`."""

    topic: str
    payload: bytes


class Link:
    """A connection and its queue; a context manager that opens and closes. One thread may use it."""

    connections: int
    """How often it has connected and subscribed; a change means: announce yourself again."""
    chunk_bytes: int
    """Largest chunk that the server's packet limit leaves room for, at most ``fields.CHUNK_BYTES``; halved by every connection
    that broke under a chunk, and doubled after NUM_GOOD messages."""
    bytes_sent: int
    """Payload bytes of the messages published."""
    bytes_received: int
    """Payload bytes of the messages received, those dropped included."""
    bytes_taken: int
    """Payload bytes that ``receive`` has given out."""
    messages_sent: int
    """Messages published."""

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        topics: Sequence[str],
        will: Will | None = None,
        ca_file: str | None = None,
        cert: str | None = None,
        key: str | None = None,
        party: Party = NOBODY,
        keepalive_s: int = 30,
        queue_size: int = 16_384,
    ) -> None:
        """Check the address; :meth:`open` connects.

        Args:
            url: as :func:`fleetune.device_runtime.network.address.parse_url` takes it.
            client_id: what the server knows this side by; a second one with it throws the first out.
            topics: filters to subscribe to, at every connection.
            will: what to say when this side vanishes.
            ca_file: PEM file of the authorities to trust instead of the system's.
            cert: PEM file of the certificate to show to a server that asks for one.
            key: PEM file of its private key, if that is another file.
            party: what to say when the server denies something, or somebody else has this client id.
            keepalive_s: after one and a half times that in silence the server takes this side for dead.
            queue_size: messages received and not yet taken, of all senders together; in all ``mailbox.QUEUED_BYTES``.

        Raises:
            ConfigError: a URL, ``ca_file``, ``cert`` or ``key`` that cannot be used.
        """
        self.address = parse_url(url)
        self.client_id = client_id
        self._hooks = Hooks(
            topics=tuple(topics),
            will=will,
            tls=_tls(self.address, ca_file=ca_file, cert=cert, key=key),
            keepalive_s=keepalive_s,
            on_message=self._take_in,
            on_ready=self._be_ready,
            on_ack=self._free_place,
            on_cut=self._be_cut,
            on_failure=self._fail,
            on_unheard=self._be_unheard,
            on_kept=self._mind_kept,
            party=party,
        )
        self._failure = ""
        self._received = Mailbox(queue_size)
        self._acknowledged = threading.Condition()
        self._num_queued = 0
        self._client: Client | None = None
        self.can_listen = True
        """Whether the server has refused no topic that was listened to besides."""
        self._packet_bytes_max = 0
        self._chunk_limit, self._num_good = CHUNK_BYTES, 0
        self.chunk_bytes = CHUNK_BYTES
        self.connections = self.bytes_sent = self.bytes_received = self.messages_sent = 0
        self.bytes_taken = 0
        self._too_large = self._num_kept = 0

    @classmethod
    def reaching(
        cls,
        url: str,
        reach: Reach,
        *,
        client_id: str,
        topics: Sequence[str],
        will: Will | None = None,
        party: Party = NOBODY,
    ) -> "Link":
        """As the constructor, with the files that ``reach`` names; its ``timeout_s`` is for :meth:`open`."""
        return cls(
            url,
            client_id=client_id,
            topics=topics,
            will=will,
            ca_file=reach.ca_file or None,
            cert=reach.cert or None,
            key=reach.key or None,
            party=party,
        )

    @property
    def connected(self) -> bool:
        """Whether the connection stands now, as far as this side knows."""
        return self._client is not None and self._client.is_connected

    @property
    def dropped(self) -> int:
        """Messages received and thrown away: the queue was full or they were too large."""
        return self._received.dropped + self._too_large

    def open(self, timeout_s: float = 20) -> None:
        """Connect and subscribe; while no server answers, try again until ``timeout_s`` have passed.

        Raises:
            TransportError: nobody is there; or, at once, the server refuses the login or a topic, with its reason.
        """
        deadline = time.monotonic() + timeout_s
        while (reason := self._connect(deadline)) is not None:
            if time.monotonic() >= deadline:
                raise TransportError(f"{self.address.shown}: no MQTT server answers: {reason}")
            time.sleep(min(0.25, max(0.0, deadline - time.monotonic())))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Hand a message to the sending thread, QoS 1; it goes out when the connection stands.

        Raises:
            TransportError: larger than the server takes; or ``QUEUED_MAX`` messages wait and the server has not
                acknowledged one for ``PATIENCE_S``; or the link is not open, or is of no more use.
        """
        self._check_use()
        if self._client is None:
            raise TransportError(f"{self.address.shown}: the link is not open")
        self._check_size(topic, payload)
        self._take_place()
        try:
            self._client.publish(topic, payload, retain=retain)
        except TransportError:
            self._free_place()
            raise
        self.messages_sent += 1
        self.bytes_sent += len(payload)

    def listen(self, topic: str) -> None:
        """Subscribe to one topic more, QoS 1; a server that refuses has ``can_listen`` become false. Lost with the connection."""
        if self._client is not None:
            self._client.listen(topic)

    def unlisten(self, topic: str) -> None:
        """Take back a ``listen``."""
        if self._client is not None:
            self._client.unlisten(topic)

    @property
    def messages_acknowledged(self) -> int:
        """How many of the messages published, the oldest, are with the server, or lost with a connection."""
        return self.messages_sent - self._num_queued

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Return the next (topic, payload), or None: after ``timeout_s`` without one, or at a reconnection.

        Raises:
            TransportError: the server refuses this side for good, or somebody else has its client id.
        """
        self._check_use()
        message = self._received.get(timeout_s)
        self._check_use()
        self.bytes_taken += len(message[1]) if message else 0
        return message

    @property
    def has_waiting(self) -> bool:
        """Whether a message can be taken at once."""
        return len(self._received) > 0

    def is_unread(self, topic: str) -> bool:
        """Whether a message of the sender that speaks on ``topic`` waits to be taken."""
        return self._received.has_of(topic)

    def flush(self, timeout_s: float) -> bool:
        """Wait until the server has acknowledged everything published; False if it has not in time."""
        with self._acknowledged:
            return self._acknowledged.wait_for(lambda: self._num_queued == 0, timeout_s)

    def close(self, *, flush_s: float = 3.0) -> None:
        """Wait at most ``flush_s`` for what is on its way, say goodbye (the will is not published), and stop."""
        if self._client is None:
            return
        if self._client.is_connected:
            self.flush(flush_s)
        client, self._client = self._client, None
        client.stop()

    def __enter__(self) -> "Link":
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, deadline: float) -> str | None:
        reason: str | None = None
        for version in self.address.versions:
            client = Client(self.address, self.client_id, self._hooks, is_v5=version == "5")
            reason, may_be_version = client.connect(deadline)
            if reason is None:
                self._client = client
            if not may_be_version:
                break
        return reason

    def _check_use(self) -> None:
        if self._failure:
            raise TransportError(self._failure)

    def _fail(self, reason: str) -> None:
        self._failure = reason
        self._wake()

    def _wake(self) -> None:
        """End the wait for a message."""
        self._received.wake()

    def _check_size(self, topic: str, payload: bytes) -> None:
        if 0 < self._packet_bytes_max < len(payload) + len(topic.encode()) + 16:
            # Sent all the same, it would have the server hang up, and again after every reconnection.
            raise TransportError(
                f"{self.address.shown}: a message of {len(payload)} bytes; "
                f"the server takes packets of at most {self._packet_bytes_max}"
            )

    def _take_place(self) -> None:
        with self._acknowledged:
            if not self._acknowledged.wait_for(lambda: self._num_queued < QUEUED_MAX, PATIENCE_S):
                raise TransportError(
                    f"{self.address.shown}: {QUEUED_MAX} messages wait, none was acknowledged for {PATIENCE_S:g} s"
                )
            self._num_queued += 1

    def _be_unheard(self) -> None:
        self.can_listen = False
        self._wake()

    def _be_cut(self, size_bytes: int) -> None:
        """A connection broke under a message of this size: smaller ones may get through."""
        self._num_good = 0
        self._chunk_limit = max(CHUNK_BYTES_MIN, self._chunk_limit // 2)
        log.info(
            "%s: lost under a message of %d bytes; chunks of %d now",
            self.address.shown,
            size_bytes,
            self._chunk_limit,
        )
        self._limit_chunks()

    def _limit_chunks(self) -> None:
        room = (self._packet_bytes_max or MESSAGE_BYTES_MAX) - HEADER_BYTES
        self.chunk_bytes = min(self._chunk_limit, room)

    def _free_place(self) -> None:
        self._num_good += 1
        if self._chunk_limit < CHUNK_BYTES and self._num_good >= NUM_GOOD:
            self._num_good, self._chunk_limit = 0, min(CHUNK_BYTES, 2 * self._chunk_limit)
            self._limit_chunks()
        with self._acknowledged:
            self._num_queued -= 1
            self._acknowledged.notify_all()

    def _take_in(self, topic: str, payload: bytes) -> None:
        self.bytes_received += len(payload)
        if len(payload) > MESSAGE_BYTES_MAX:
            self._too_large += 1
        else:
            self._received.put(topic, payload)

    def _mind_kept(self, topic: str) -> None:
        if not self._num_kept:
            log.warning(
                "%s keeps a message on %s, where nobody of ours keeps any: not read; mosquitto_pub -r -n -t TOPIC clears it",
                self.address.shown,
                one_line(topic),
            )
        self._num_kept += 1

    def _be_ready(self, packet_bytes_max: int) -> None:
        self._packet_bytes_max = packet_bytes_max
        self._limit_chunks()
        self.connections += 1
        if self.connections > 1:
            self._wake()


def _tls(address: Address, *, ca_file: str | None, cert: str | None, key: str | None) -> Context | None:
    if address.is_tls:
        return make_context(ca_file=ca_file, cert=cert, key=key)
    if cert or key:
        raise ConfigError(f"{address.shown}: a certificate is shown over TLS only; use mqtts:// or wss://")
    if ca_file:
        log.warning("%s: not encrypted, so --ca-file is of no use; mqtts:// is", address.shown)
    return None
