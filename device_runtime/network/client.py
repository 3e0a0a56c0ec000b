"""One MQTT client as paho has it: connects once, and from then on reconnects by itself; the only file that knows paho."""

import contextlib
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleetune.device_runtime.contracts.wire import MESSAGE_BYTES_MAX
from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network.address import Address

log = logging.getLogger(__name__)

HEADER_BYTES = 512
"""Topic, message fields and packet header around a chunk; about 300 at most."""
PACKET_BYTES_MIN = 1024 + HEADER_BYTES
"""A server that takes less is refused."""

_VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
_CONNACK_S = 10.0
_CONNACK_V5_S = (
    2.0  # amqtt 0.12 takes an MQTT 5 CONNECT for the first part of a longer one and waits for the rest
)
_UNSUPPORTED_VERSION = 0x84
_COME_BACK_LATER = (0x88, 0x89, 0x97, 0x9F)  # unavailable, busy, quota exceeded, connection rate exceeded


class Hooks(NamedTuple):
    """What a client is to do for its link, and whom to tell; the three are called in paho's thread."""

    topics: tuple[str, ...]
    """Filters to subscribe to at every connection."""
    will: tuple[str, bytes] | None
    """(topic, payload) that the server publishes, retained, when this side vanishes without a goodbye."""
    tls: ssl.SSLContext | None
    keepalive_s: int
    on_message: Callable[[str, bytes], None]
    """(topic, payload) has come."""
    on_ready: Callable[[int], None]
    """Connected and subscribed; with the largest packet that the server takes, 0 for no limit."""
    on_ack: Callable[[], None]
    """The server has answered for one message published."""


class _Socket(Protocol):
    def fileno(self) -> int: ...


class Client:
    """Given up if its first connection fails; afterwards it reconnects by itself until it is stopped."""

    def __init__(self, address: Address, client_id: str, hooks: Hooks, *, is_v5: bool) -> None:
        self._address, self._client_id, self._hooks, self._is_v5 = address, client_id, hooks, is_v5
        self._outcome: queue.Queue[tuple[str | None, int]] = queue.Queue(1)
        self._packet_bytes_max = 0
        self._has_connected = False
        self._paho = _new_paho(address, client_id, is_v5=is_v5)
        if hooks.tls:
            self._paho.tls_set_context(hooks.tls)
        if hooks.will:
            self._paho.will_set(*hooks.will, qos=1, retain=True)
        self._paho.on_socket_open = _send_at_once
        self._paho.on_connect = self._on_connect
        self._paho.on_subscribe = self._on_subscribe
        self._paho.on_publish = self._on_publish
        self._paho.on_disconnect = self._on_disconnect
        self._paho.on_message = lambda _client, _data, message: hooks.on_message(
            message.topic, bytes(message.payload)
        )

    @property
    def is_connected(self) -> bool:
        """Whether the connection stands now, as far as this side knows."""
        return self._paho.is_connected()

    def connect(self, deadline: float) -> tuple[str | None, bool]:
        """Connect and subscribe; return why not (None: it stands), and whether another version may do.

        Raises:
            TransportError: the server refuses the login or a topic, or its certificate is not trusted.
        """
        shown = self._address.shown
        try:
            self._knock(deadline)
        except ssl.SSLCertVerificationError as exc:
            raise TransportError(f"{shown}: its certificate is not trusted: {exc.verify_message}") from exc
        except OSError as exc:
            return exc.strerror or str(exc) or type(exc).__name__, False
        reason, code = self._wait(deadline)
        if reason is None:
            return None, False
        self.stop()
        if code not in (_UNSUPPORTED_VERSION, *_COME_BACK_LATER):
            raise TransportError(f"{shown} refuses {self._who()}: {reason}")
        return reason, self._is_v5 and code == _UNSUPPORTED_VERSION

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Hand a message to the sending thread, QoS 1; TransportError if it is not taken."""
        rc = self._paho.publish(topic, payload, qos=1, retain=retain).rc
        if rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise TransportError(f"{self._address.shown}: cannot send: {paho.error_string(rc)}")

    def stop(self) -> None:
        """Say goodbye, and stop."""
        self._paho.disconnect()
        # loop_stop waits for acknowledgements that a frozen server never sends, without limit.
        stopping = threading.Thread(target=self._paho.loop_stop, daemon=True)
        stopping.start()
        stopping.join(2.0)
        if stopping.is_alive() and (left := self._paho.socket()) is not None:
            with contextlib.suppress(OSError):
                left.close()

    def _knock(self, deadline: float) -> None:
        address, keepalive_s = self._address, self._hooks.keepalive_s
        self._paho.connect_timeout = max(1.0, deadline - time.monotonic())
        if self._is_v5:
            options = _connect_properties()
            self._paho.connect(address.host, address.port, keepalive_s, clean_start=True, properties=options)
        else:
            self._paho.connect(address.host, address.port, keepalive_s)
        self._paho.loop_start()

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
        username = self._address.username
        return f"user {username!r}" if username else f"client {self._client_id!r} without a user name"

    def _on_connect(
        self,
        client: paho.Client,
        _data: object,
        _flags: object,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            level = logging.WARNING if self._has_connected else logging.DEBUG  # connect() reports the first
            log.log(level, "%s refuses the connection: %s", self._address.shown, code)
            self._tell(str(code), code.value)
            return
        self._packet_bytes_max = getattr(properties, "MaximumPacketSize", 0)
        if 0 < self._packet_bytes_max < PACKET_BYTES_MIN:
            self._tell(f"its packets of at most {self._packet_bytes_max} bytes are too small", 0x95)
        elif self._hooks.topics:
            client.subscribe([(topic, 1) for topic in self._hooks.topics])
        else:
            self._ready()

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [topic for topic, code in zip(self._hooks.topics, codes, strict=False) if code.is_failure]
        if refused:
            log.error("%s refuses the subscription to %s", self._address.shown, ", ".join(refused))
            self._tell(f"no permission to subscribe to {', '.join(refused)}", 0x87)
        else:
            self._ready()

    def _ready(self) -> None:
        # Told only now: an answer to an announcement would be lost before the server knows the subscription.
        self._has_connected = True
        self._hooks.on_ready(self._packet_bytes_max)
        log.info("%s: connected as %s", self._address.shown, self._client_id)
        self._tell(None, 0)

    def _on_publish(
        self, _client: paho.Client, _data: object, _mid: int, code: ReasonCode, _properties: object
    ) -> None:
        if code.is_failure:
            log.warning("%s refuses a message of %s: %s", self._address.shown, self._client_id, code)
        self._hooks.on_ack()

    def _on_disconnect(
        self, _client: paho.Client, _data: object, _flags: object, code: ReasonCode, _properties: object
    ) -> None:
        log.info("%s: disconnected: %s", self._address.shown, code)
        self._tell("it hangs up", _UNSUPPORTED_VERSION)


def _new_paho(address: Address, client_id: str, *, is_v5: bool) -> paho.Client:
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=_VERSIONS["5" if is_v5 else "3.1.1"],
        transport="websockets" if address.is_websocket else "tcp",
    )
    client.reconnect_delay_set(1, 15)
    client.max_queued_messages_set(0)  # without limit: the link has one of its own
    if address.is_websocket:
        client.ws_set_options(path=address.path)
    if address.username:
        client.username_pw_set(address.username, address.password)
    return client


def _connect_properties() -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MESSAGE_BYTES_MAX + HEADER_BYTES
    return properties


def _send_at_once(_client: paho.Client, _data: object, opened: _Socket) -> None:
    """Switch Nagle's algorithm off: a small message would wait for the acknowledgement of the one before, 40 ms and more."""
    with socket.socket(fileno=os.dup(opened.fileno())) as same:  # a WebSocket of paho's has no setsockopt
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
