"""One MQTT connection: MQTT 5 where the server has it, 3.1.1 otherwise; plain, TLS or WebSocket; QoS 1.

Paho's thread serves keep-alive, reconnects, subscribes again, and only fills one bounded queue. No session is relied
upon: messages may get lost, and :attr:`Link.connections` tells when to announce oneself again.
"""

import contextlib
import logging
import queue
import ssl
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleetune.device_runtime.contracts.wire import CHUNK_BYTES, MESSAGE_BYTES_MAX
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.address import Address, parse_url

log = logging.getLogger(__name__)

QUEUED_MAX = 64
"""Messages published and not yet acknowledged by the server."""
PATIENCE_S = 15.0
"""How long ``publish`` waits for room among them."""

_VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
_HEADER_BYTES = 512  # topic, message fields and packet header around a chunk; about 300 at most
_CHUNK_BYTES_MIN = 1024
_CONNACK_S = 10.0
_CONNACK_V5_S = (
    2.0  # amqtt 0.12 takes an MQTT 5 CONNECT for the first part of a longer one and waits for the rest
)
_UNSUPPORTED_VERSION = 0x84
_COME_BACK_LATER = (0x88, 0x89, 0x97, 0x9F)  # unavailable, busy, quota exceeded, connection rate exceeded


class Will(NamedTuple):
    """What the server publishes, retained, when this side vanishes without :meth:`Link.close`."""

    topic: str
    payload: bytes


class Link:
    """A connection and its queue; a context manager that opens and closes. One thread may use it."""

    connections: int
    """How often it has connected and subscribed; a change means: announce yourself again."""
    chunk_bytes: int
    """Largest chunk that the server's packet limit leaves room for, at most ``wire.CHUNK_BYTES``."""
    bytes_sent: int
    """Payload bytes of the messages published."""
    bytes_received: int
    """Payload bytes of the messages received, those dropped included."""
    dropped: int
    """Messages received and thrown away: the queue was full or they were too large."""

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        topics: Sequence[str],
        will: Will | None = None,
        ca_file: str | None = None,
        keepalive_s: int = 30,
        queue_size: int = 2048,
    ) -> None:
        """Check the address; :meth:`open` connects.

        Args:
            url: as :func:`fleetune.device_runtime.network.address.parse_url` takes it.
            client_id: what the server knows this side by; a second one with it throws the first out.
            topics: filters to subscribe to, at every connection.
            will: what to say when this side vanishes.
            ca_file: PEM file of the authorities to trust instead of the system's.
            keepalive_s: after one and a half times that in silence the server takes this side for dead.
            queue_size: messages received and not yet taken.

        Raises:
            ConfigError: a URL or a ``ca_file`` that cannot be used.
        """
        self.address = parse_url(url)
        self.client_id, self._topics, self._will = client_id, tuple(topics), will
        self._tls = _tls(ca_file) if self.address.is_tls else None
        self._keepalive_s = keepalive_s
        self._received: queue.Queue[tuple[str, bytes]] = queue.Queue(queue_size)
        self._acknowledged = threading.Condition()
        self._num_queued = 0
        self._client: paho.Client | None = None
        self._packet_bytes_max = 0
        self.chunk_bytes = CHUNK_BYTES
        self.connections = self.bytes_sent = self.bytes_received = self.dropped = 0

    @property
    def connected(self) -> bool:
        """Whether the connection stands now, as far as this side knows."""
        return self._client is not None and self._client.is_connected()

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
                acknowledged one for ``PATIENCE_S``; or the link is not open.
        """
        if self._client is None:
            raise TransportError(f"{self.address.shown}: the link is not open")
        self._check_size(topic, payload)
        self._take_place()
        rc = self._client.publish(topic, payload, qos=1, retain=retain).rc
        if rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            self._free_place()
            raise TransportError(f"{self.address.shown}: cannot send: {paho.error_string(rc)}")
        self.bytes_sent += len(payload)

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Return the next (topic, payload), or None after ``timeout_s`` without one."""
        try:
            return self._received.get(timeout=timeout_s) if timeout_s > 0 else self._received.get_nowait()
        except queue.Empty:
            return None

    def flush(self, timeout_s: float) -> bool:
        """Wait until the server has acknowledged everything published; False if it has not in time."""
        with self._acknowledged:
            return self._acknowledged.wait_for(lambda: self._num_queued == 0, timeout_s)

    def close(self, *, flush_s: float = 3.0) -> None:
        """Wait at most ``flush_s`` for what is on its way, say goodbye (the will is not published), and stop."""
        if self._client is None:
            return
        if self._client.is_connected():
            self.flush(flush_s)
        client, self._client = self._client, None
        _stop(client)

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
            attempt = _Attempt(self, is_v5=version == "5")
            reason, may_be_version = attempt.run(deadline)
            if reason is None:
                self._client = attempt.client
            if not may_be_version:
                break
        return reason

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

    def _free_place(self) -> None:
        with self._acknowledged:
            self._num_queued -= 1
            self._acknowledged.notify_all()

    def _take_in(self, topic: str, payload: bytes) -> None:
        self.bytes_received += len(payload)
        try:
            if len(payload) > MESSAGE_BYTES_MAX:
                raise queue.Full
            self._received.put_nowait((topic, payload))
        except queue.Full:
            self.dropped += 1

    def _set_limit(self, packet_bytes_max: int) -> None:
        self._packet_bytes_max = packet_bytes_max
        self.chunk_bytes = (
            min(CHUNK_BYTES, packet_bytes_max - _HEADER_BYTES) if packet_bytes_max else CHUNK_BYTES
        )


class _Attempt:
    """One paho client of a link: given up if its first connection fails; afterwards it reconnects by itself."""

    def __init__(self, link: Link, *, is_v5: bool) -> None:
        self._link, self._is_v5 = link, is_v5
        self._outcome: queue.Queue[tuple[str | None, int]] = queue.Queue(1)
        self.client = _new_client(link.address, link.client_id, is_v5=is_v5)
        if link._tls:
            self.client.tls_set_context(link._tls)
        if link._will:
            self.client.will_set(link._will.topic, link._will.payload, qos=1, retain=True)
        self.client.on_connect = self._on_connect
        self.client.on_subscribe = self._on_subscribe
        self.client.on_publish = self._on_publish
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = lambda _client, _data, message: link._take_in(
            message.topic, bytes(message.payload)
        )

    def run(self, deadline: float) -> tuple[str | None, bool]:
        """Connect and subscribe; return why not (None: it stands), and whether another version may do."""
        shown = self._link.address.shown
        try:
            self._knock(deadline)
        except ssl.SSLCertVerificationError as exc:
            raise TransportError(f"{shown}: its certificate is not trusted: {exc.verify_message}") from exc
        except OSError as exc:
            return exc.strerror or str(exc) or type(exc).__name__, False
        reason, code = self._wait(deadline)
        if reason is None:
            return None, False
        _stop(self.client)
        if code not in (_UNSUPPORTED_VERSION, *_COME_BACK_LATER):
            raise TransportError(f"{shown} refuses {self._who()}: {reason}")
        return reason, self._is_v5 and code == _UNSUPPORTED_VERSION

    def _knock(self, deadline: float) -> None:
        address, keepalive_s = self._link.address, self._link._keepalive_s
        self.client.connect_timeout = max(1.0, deadline - time.monotonic())
        if self._is_v5:
            options = _connect_properties()
            self.client.connect(address.host, address.port, keepalive_s, clean_start=True, properties=options)
        else:
            self.client.connect(address.host, address.port, keepalive_s)
        self.client.loop_start()

    def _wait(self, deadline: float) -> tuple[str | None, int]:
        patience_s = _CONNACK_V5_S if self._is_v5 else _CONNACK_S
        try:
            return self._outcome.get(timeout=max(1.0, min(patience_s, deadline - time.monotonic())))
        except queue.Empty:
            return "it takes the connection and says nothing", _UNSUPPORTED_VERSION

    def _tell(self, reason: str | None, code: int) -> None:
        with contextlib.suppress(queue.Full):  # only the first outcome matters
            self._outcome.put_nowait((reason, code))

    def _who(self) -> str:
        username = self._link.address.username
        return f"user {username!r}" if username else f"client {self._link.client_id!r} without a user name"

    def _on_connect(
        self,
        client: paho.Client,
        _data: object,
        _flags: object,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            level = logging.WARNING if self._link.connections else logging.DEBUG  # open() reports the first
            log.log(level, "%s refuses the connection: %s", self._link.address.shown, code)
            self._tell(str(code), code.value)
            return
        self._link._set_limit(getattr(properties, "MaximumPacketSize", 0))
        if self._link.chunk_bytes < _CHUNK_BYTES_MIN:
            self._tell(f"its packets of at most {self._link._packet_bytes_max} bytes are too small", 0x95)
        elif self._link._topics:
            client.subscribe([(topic, 1) for topic in self._link._topics])
        else:
            self._ready()

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [topic for topic, code in zip(self._link._topics, codes, strict=False) if code.is_failure]
        if refused:
            log.error("%s refuses the subscription to %s", self._link.address.shown, ", ".join(refused))
            self._tell(f"no permission to subscribe to {', '.join(refused)}", 0x87)
        else:
            self._ready()

    def _ready(self) -> None:
        # Counted only now: an answer to an announcement would be lost before the server knows the subscription.
        self._link.connections += 1
        log.info("%s: connected as %s", self._link.address.shown, self._link.client_id)
        self._tell(None, 0)

    def _on_publish(
        self, _client: paho.Client, _data: object, _mid: int, code: ReasonCode, _properties: object
    ) -> None:
        if code.is_failure:
            log.warning(
                "%s refuses a message of %s: %s", self._link.address.shown, self._link.client_id, code
            )
        self._link._free_place()

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        log.info("%s: disconnected: %s", self._link.address.shown, code)
        self._tell("it hangs up", _UNSUPPORTED_VERSION)


def _new_client(address: Address, client_id: str, *, is_v5: bool) -> paho.Client:
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=_VERSIONS["5" if is_v5 else "3.1.1"],
        transport="websockets" if address.is_websocket else "tcp",
    )
    client.reconnect_delay_set(1, 15)
    client.max_queued_messages_set(2 * QUEUED_MAX)  # never reached: publish stops before
    if address.is_websocket:
        client.ws_set_options(path=address.path)
    if address.username:
        client.username_pw_set(address.username, address.password)
    return client


def _connect_properties() -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MESSAGE_BYTES_MAX + _HEADER_BYTES
    return properties


def _tls(ca_file: str | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as exc:
        raise ConfigError(f"{ca_file}: cannot be read as PEM certificates: {exc}") from exc


def _stop(client: paho.Client) -> None:
    client.disconnect()
    # loop_stop waits for acknowledgements that a frozen server never sends, without limit.
    stopping = threading.Thread(target=client.loop_stop, daemon=True)
    stopping.start()
    stopping.join(2.0)
    if stopping.is_alive() and (socket := client.socket()) is not None:
        with contextlib.suppress(OSError):
            socket.close()
