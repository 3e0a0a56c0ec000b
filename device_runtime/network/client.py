"""One MQTT client as paho has it: connects once, and from then on reconnects by itself; the only file that knows paho."""

import contextlib
import logging
import os
import queue
import socket
import ssl
import sys
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
from fleetune.device_runtime.network import refusals, tls
from fleetune.device_runtime.network.address import Address
from fleetune.device_runtime.network.interruptions import Evictions, Outage

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
_HUNG_UP = -1
_TOO_SMALL = refusals.PACKET_TOO_LARGE
_REFUSED_S = 60.0
"""Who was let in before and is refused for so long stops: its login was taken away."""
_TELL_EVERY_S = 60.0


class Party(NamedTuple):
    """What a client says of its user, who alone knows, when the server refuses or somebody else takes its place."""

    denied: str = ""
    """What to do when the server denies a message or a subscription."""
    taken: str = ""
    """Who else may be connected under the same client id, and what to do."""
    is_other: Callable[[bytes], bool] = lambda _: False
    """Whether a message under the will's topic says that somebody else is online there."""


NOBODY = Party()


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
    on_failure: Callable[[str], None] = lambda _: None
    """It is of no use to go on, and why; the client has stopped."""
    party: Party = NOBODY


class _Socket(Protocol):
    def fileno(self) -> int: ...


class Client:
    """Given up if its first connection fails; afterwards it reconnects by itself until it is stopped."""

    def __init__(self, address: Address, client_id: str, hooks: Hooks, *, is_v5: bool) -> None:
        self._address, self._client_id, self._hooks, self._is_v5 = address, client_id, hooks, is_v5
        self._outcome: queue.Queue[tuple[str | None, int]] = queue.Queue(1)
        self._packet_bytes_max = 0
        self._has_connected = self._is_stopping = False
        self._outage, self._evictions = Outage(), Evictions()
        self._ready_at: float | None = None
        self._refused_at: float | None = None
        self._moved_bytes = 0
        self._sizes: dict[int, int] = {}
        self._told_at: dict[int, float] = {}
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
        self._paho.on_connect_fail = self._on_connect_fail
        self._paho.on_message = self._on_message

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
        except ssl.SSLError as exc:
            return self._not_trusted(tls.explain(exc)), False
        except OSError as exc:
            return self._plainly(exc.strerror or str(exc) or type(exc).__name__), False
        reason, code = self._wait(deadline)
        if reason is None:
            return None, False
        self.stop()
        if code not in (refusals.UNSUPPORTED_VERSION, _HUNG_UP) and not refusals.passes_at_connect(code):
            raise TransportError(f"{shown} refuses {self._who()}: {reason}")
        if code == _HUNG_UP:
            reason = self._why_hung_up()
        return reason, self._is_v5 and code in (refusals.UNSUPPORTED_VERSION, _HUNG_UP)

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Hand a message to the sending thread, QoS 1; TransportError if it is not taken."""
        info = self._paho.publish(topic, payload, qos=1, retain=retain)
        rc = info.rc
        self._sizes[info.mid] = len(payload)
        if rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise TransportError(f"{self._address.shown}: cannot send: {paho.error_string(rc)}")

    def stop(self) -> None:
        """Say goodbye, and stop."""
        self._is_stopping = True
        self._paho.disconnect()
        # loop_stop waits for acknowledgements that a frozen server never sends, without limit.
        stopping = threading.Thread(target=self._paho.loop_stop, daemon=True)
        stopping.start()
        stopping.join(2.0)
        if stopping.is_alive() and (left := self._paho.socket()) is not None:
            with contextlib.suppress(OSError):
                left.close()

    def _not_trusted(self, reason: str) -> str:
        """What TLS says, raised if it will not change."""
        if tls.is_final(reason):
            raise TransportError(f"{self._address.shown}: {reason}")
        return reason

    def _plainly(self, reason: str) -> str:
        return self._why_hung_up() if "reset" in reason or "EOF" in reason else reason

    def _why_hung_up(self) -> str:
        address = self._address
        if self._hooks.tls:
            return self._not_trusted(tls.trouble(address, self._hooks.tls)) or "it hangs up"
        if tls.speaks_tls(address):
            secure = "wss" if address.is_websocket else "mqtts"
            raise TransportError(
                f"{address.shown}: the server speaks TLS on this port; address it as {secure}://{address.host}:{address.port}"
            )
        return "it hangs up"

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
            return "it takes the connection and says nothing", refusals.UNSUPPORTED_VERSION

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
            self._on_refused(code)
            return
        self._packet_bytes_max = getattr(properties, "MaximumPacketSize", 0)
        if 0 < self._packet_bytes_max < PACKET_BYTES_MIN:
            self._tell(f"its packets of at most {self._packet_bytes_max} bytes are too small", _TOO_SMALL)
        elif self._hooks.topics:
            client.subscribe([(topic, 1) for topic in self._hooks.topics])
        else:
            self._ready()

    def _on_subscribe(
        self, _client: paho.Client, _data: object, _mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        refused = [topic for topic, code in zip(self._hooks.topics, codes, strict=False) if code.is_failure]
        if not refused:
            self._ready()
            return
        reason = f"no permission to subscribe to {', '.join(refused)}"
        self._give_up(refusals.explain(refusals.NOT_AUTHORIZED, reason, denied=self._hooks.party.denied))

    def _ready(self) -> None:
        # Told only now: an answer to an announcement would be lost before the server knows the subscription.
        self._has_connected, self._refused_at = True, None
        self._ready_at, self._moved_bytes = time.monotonic(), 0
        self._hooks.on_ready(self._packet_bytes_max)
        log.info("%s: connected as %s", self._address.shown, self._client_id)
        if away_s := self._outage.ends(time.monotonic()):
            log.warning("%s: connected again after %.0f s", self._address.shown, away_s)
        self._tell(None, 0)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        self._moved_bytes += len(message.payload)
        self._hooks.on_message(message.topic, bytes(message.payload))

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object
    ) -> None:
        self._moved_bytes += self._sizes.pop(mid, 0)
        if code.is_failure:
            self._on_denied(code, "a message of")
        self._hooks.on_ack()

    def _on_disconnect(
        self, _client: paho.Client, _data: object, flags: paho.DisconnectFlags, code: ReasonCode, _: object
    ) -> None:
        log.info("%s: disconnected: %s", self._address.shown, code)
        self._tell("it hangs up", _HUNG_UP)
        stood_at, self._ready_at = self._ready_at, None
        if self._is_stopping or not self._has_connected:
            return
        self._miss(str(code))
        is_told = flags.is_disconnect_packet_from_server
        is_taken = is_told and code.value == refusals.TAKEN_OVER
        if is_told and not is_taken:
            self._on_denied(code, "the connection of")
        if stood_at is not None and not self._is_stopping:
            self._look_for_another(time.monotonic() - stood_at, is_told=is_taken)

    def _on_connect_fail(self, _client: paho.Client, _data: object) -> None:
        exc = sys.exc_info()[1]
        self._miss(tls.explain(exc) if isinstance(exc, ssl.SSLError) else str(exc))

    def _on_refused(self, code: ReasonCode) -> None:
        """A connection is refused: the first one ends, later ones are tried for a while."""
        may = f"check the user name, the password, and whether this user may connect as {self._client_id}"
        reason = refusals.explain(code.value, str(code), denied=may)
        self._tell(reason, code.value)
        if not self._has_connected:
            return
        now = time.monotonic()
        self._refused_at = self._refused_at or now
        text = f"{self._address.shown} refuses {self._who()}: {reason}"
        if refusals.passes(code.value) or now - self._refused_at < _REFUSED_S:
            self._warn(code.value, text)
        else:
            self._fail(text)

    def _on_denied(self, code: ReasonCode, what: str) -> None:
        """The server refuses what a client that it let in does."""
        reason = refusals.explain(code.value, str(code), denied=self._hooks.party.denied)
        text = f"{self._address.shown} refuses {what} {self._client_id}: {reason}"
        if refusals.passes(code.value):
            self._warn(code.value, text)
        else:
            self._fail(text)

    def _give_up(self, reason: str) -> None:
        """The first connection is of no use, or a later one."""
        self._tell(reason, refusals.NOT_AUTHORIZED)
        if self._has_connected:
            self._fail(f"{self._address.shown} refuses {self._who()}: {reason}")

    def _fail(self, text: str) -> None:
        self._is_stopping = True
        self._hooks.on_failure(text)
        self._paho.disconnect()

    def _warn(self, code: int, text: str) -> None:
        """Warn once a minute of the same."""
        now = time.monotonic()
        if now - self._told_at.get(code, -_TELL_EVERY_S) >= _TELL_EVERY_S:
            self._told_at[code] = now
            log.warning("%s", text)

    def _miss(self, reason: str) -> None:
        if away_s := self._outage.lasts(time.monotonic()):
            log.warning(
                "%s: no connection for %.0f s (%s); trying again", self._address.shown, away_s, reason
            )

    def _look_for_another(self, lasted_s: float, *, is_told: bool) -> None:
        """Stay away for a moment if somebody else may have this client id, and stop if somebody has."""
        evictions, party = self._evictions, self._hooks.party
        look_s = evictions.look_s(lasted_s=lasted_s, moved_bytes=self._moved_bytes, is_told=is_told)
        if not look_s or self._hooks.will is None:
            return
        shown, name = self._address.shown, self._client_id
        if self._is_there_another(look_s):
            self._fail(f"{shown}: the session of {name} was taken over: {party.taken}")
        elif is_told or evictions.num_in_row > 2:
            why = (
                "another client took over" if is_told else f"the server hung up {evictions.num_in_row} times"
            )
            log.warning("%s: %s as %s; perhaps %s; or %s", shown, why, name, party.taken, party.denied)

    def _is_there_another(self, look_s: float) -> bool:
        """Listen to the will's topic under another client id."""
        heard: queue.Queue[bytes] = queue.Queue()
        topic = self._hooks.will[0] if self._hooks.will else ""
        hooks = Hooks((topic,), None, self._hooks.tls, self._hooks.keepalive_s,
                      on_message=lambda _, payload: heard.put(payload), on_ready=lambda _: None, on_ack=lambda: None)  # fmt: skip
        witness = Client(self._address, f"{self._client_id}-witness", hooks, is_v5=self._is_v5)
        deadline = time.monotonic() + look_s
        try:
            if witness.connect(deadline)[0] is not None:
                return False
            while not self._is_stopping and (left_s := deadline - time.monotonic()) > 0:
                if self._hooks.party.is_other(heard.get(timeout=left_s)):
                    return True
        except (TransportError, queue.Empty):
            pass
        finally:
            witness.stop()
        return False


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
