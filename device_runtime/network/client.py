"""One MQTT client: connects once, and from then on reconnects by itself; how it sends and reads is in paho_client.py."""

import contextlib
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Sequence

from paho.mqtt import client as paho
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from fleetune.device_runtime.contracts.fields import MESSAGE_BYTES_MAX
from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network import refusals, tls
from fleetune.device_runtime.network.address import Address
from fleetune.device_runtime.network.hooks import Hooks
from fleetune.device_runtime.network.paho_client import Opened, new_paho
from fleetune.device_runtime.network.standing import HUNG_UP, Standing

HEADER_BYTES = 512
"""Topic, message fields and packet header around a chunk; about 300 at most."""
PACKET_BYTES_MIN = 1024 + HEADER_BYTES
"""A server that takes less is refused."""

KEPT = "status"
"""Last part of the topics whose messages are retained; what somebody else has a server keep on others is not asked for."""

_CONNACK_S = 10.0
_CONNACK_V5_S = (
    2.0  # amqtt 0.12 takes an MQTT 5 CONNECT for the first part of a longer one and waits for the rest
)


class Client:
    """Given up if its first connection fails; afterwards it reconnects by itself until it is stopped."""

    def __init__(self, address: Address, client_id: str, hooks: Hooks, *, is_v5: bool) -> None:
        self._address, self._client_id, self._hooks, self._is_v5 = address, client_id, hooks, is_v5
        self._packet_bytes_max = 0
        self._sizes: dict[int, int] = {}
        self._status_mid, self._has_spoken = 0, False
        self._topics_mid: int | None = None
        self._paho = new_paho(address, client_id, is_v5=is_v5)
        self._paho.on_letter = self._on_letter
        self._standing = Standing(
            address,
            client_id,
            hooks,
            leave=self._leave,
            look=self._is_there_another,
            why_not=self._why_turned_away,
        )
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
        address, context = self._address, self._hooks.tls
        try:
            self._knock(deadline)
        except tls.HandshakeError as exc:
            return tls.raise_if_final(address, tls.explain(exc)), False
        except OSError as exc:
            plain = exc.strerror or str(exc) or type(exc).__name__
            is_hung_up = "reset" in plain or "EOF" in plain
            return tls.why_hung_up(address, context) if is_hung_up else plain, False
        patience_s = _CONNACK_V5_S if self._is_v5 else _CONNACK_S
        reason, code = self._standing.wait(max(1.0, min(patience_s, deadline - time.monotonic())))
        if reason is None:
            return None, False
        self.stop()
        may_be_version = code in (refusals.UNSUPPORTED_VERSION, HUNG_UP)
        if not may_be_version and not refusals.passes_at_connect(code):
            raise TransportError(f"{address.shown} refuses {self._standing.who}: {reason}")
        if code == HUNG_UP:
            reason = tls.why_hung_up(address, context)
        return reason, self._is_v5 and may_be_version

    def publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Hand a message to the sending thread, QoS 1; TransportError if it is not taken."""
        info = self._paho.publish(topic, payload, qos=1, retain=retain)
        rc = info.rc
        self._sizes[info.mid] = len(payload)
        if self._hooks.will and topic == self._hooks.will[0]:
            self._status_mid = info.mid
        if rc not in (MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_NO_CONN):
            raise TransportError(f"{self._address.shown}: cannot send: {paho.error_string(rc)}")

    def listen(self, topic: str) -> None:
        """Subscribe to one topic more, if there is a connection."""
        self._subscribe([topic])

    def unlisten(self, topic: str) -> None:
        """Take that back."""
        self._paho.unsubscribe(topic)

    def stop(self) -> None:
        """Say goodbye, and stop."""
        self._standing.is_stopping = True
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

    def _leave(self) -> None:
        self._paho.disconnect()

    def _subscribe(self, topics: Sequence[str]) -> int | None:
        """Ask for topics, of which MQTT 5 lets us leave out what is retained where we retain nothing; the packet's number."""
        if not self._is_v5:
            return self._paho.subscribe([(topic, 1) for topic in topics])[1]
        none, all_of = SubscribeOptions.RETAIN_DO_NOT_SEND, SubscribeOptions.RETAIN_SEND_ON_SUBSCRIBE
        asked = [
            (topic, SubscribeOptions(qos=1, retainHandling=all_of if _is_kept(topic) else none))
            for topic in topics
        ]
        return self._paho.subscribe(asked)[1]

    def _on_connect(
        self,
        _client: paho.Client,
        _data: object,
        _flags: object,
        code: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if code.is_failure:
            self._standing.refused(code.value, str(code))
            return
        self._packet_bytes_max = getattr(properties, "MaximumPacketSize", 0)
        if 0 < self._packet_bytes_max < PACKET_BYTES_MIN:
            self._standing.unfit(self._packet_bytes_max)
        elif self._hooks.topics:
            self._topics_mid = self._subscribe(self._hooks.topics)
        else:
            self._standing.ready(self._packet_bytes_max)

    def _on_subscribe(
        self, _client: paho.Client, _data: object, mid: int, codes: list[ReasonCode], _properties: object
    ) -> None:
        if mid != self._topics_mid:
            if any(code.is_failure for code in codes):
                self._hooks.on_unheard()
            return
        refused = [topic for topic, code in zip(self._hooks.topics, codes, strict=False) if code.is_failure]
        if refused:
            self._standing.unheard(refused)
        else:
            # Told only now: an answer to an announcement would be lost before the server knows the subscription.
            self._standing.ready(self._packet_bytes_max)

    def _on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        self._on_letter(message.topic, bytes(message.payload), message.retain)

    def _on_letter(self, topic: str, payload: bytes, is_retained: bool) -> None:
        self._standing.moved(len(payload))
        if is_retained and not _is_kept(topic):
            self._hooks.on_kept(topic)
            return
        self._hooks.on_message(topic, payload)

    def _on_publish(
        self, _client: paho.Client, _data: object, mid: int, code: ReasonCode, _properties: object
    ) -> None:
        self._standing.moved(self._sizes.pop(mid, 0))
        self._has_spoken |= mid == self._status_mid and not code.is_failure
        if code.is_failure:
            self._standing.denied(code.value, str(code), "a message of")
        self._hooks.on_ack()

    def _on_disconnect(
        self, _client: paho.Client, _data: object, flags: paho.DisconnectFlags, code: ReasonCode, _: object
    ) -> None:
        self._drop_large()
        self._standing.lost(code.value, str(code), is_told=flags.is_disconnect_packet_from_server)

    def _drop_large(self) -> None:
        sizes = self._paho.drop_large()
        for mid in sizes:
            self._sizes.pop(mid, None)
            self._hooks.on_ack()
        if sizes:
            self._hooks.on_cut(max(sizes.values()))

    def _on_connect_fail(self, _client: paho.Client, _data: object) -> None:
        exc = sys.exc_info()[1]
        self._standing.missed(tls.explain(exc) if isinstance(exc, tls.HandshakeError) else str(exc))

    def _why_turned_away(self) -> str:
        """Ask the server again, by a handshake of its own, why it takes this side's certificate no more."""
        words = tls.trouble(self._address, self._hooks.tls) if self._hooks.tls else ""
        return words if tls.is_final(words) else ""

    def _is_there_another(self, look_s: float) -> bool:
        """Listen to the will's topic under another client id.

        A server that names clients by their login has no other: to listen throws the other one off, and all that is heard
        is that one's last will, which came after what this side said there.
        """
        heard: queue.Queue[bytes] = queue.Queue()
        party = self._hooks.party
        topic = self._hooks.will[0] if self._hooks.will else ""
        hooks = Hooks((topic,), None, self._hooks.tls, self._hooks.keepalive_s,
                      on_message=lambda _, payload: heard.put(payload), on_ready=lambda _: None, on_ack=lambda: None)  # fmt: skip
        witness = Client(self._address, f"{self._client_id}-witness", hooks, is_v5=self._is_v5)
        deadline = time.monotonic() + look_s
        try:
            if witness.connect(deadline)[0] is not None:
                return False
            while not self._standing.is_stopping and (left_s := deadline - time.monotonic()) > 0:
                payload = heard.get(timeout=left_s)
                if party.is_other(payload) or (self._has_spoken and party.is_foreign(payload)):
                    return True
        except (TransportError, queue.Empty):
            pass
        finally:
            witness.stop()
        return False


def _is_kept(topic: str) -> bool:
    return topic.rpartition("/")[2] == KEPT


def _connect_properties() -> Properties:
    properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    properties.MaximumPacketSize = MESSAGE_BYTES_MAX + HEADER_BYTES
    return properties


def _send_at_once(_client: paho.Client, _data: object, opened: Opened) -> None:
    """Switch Nagle's algorithm off: a small message would wait for the acknowledgement of the one before, 40 ms and more."""
    with socket.socket(fileno=os.dup(opened.fileno())) as same:  # a WebSocket of paho's has no setsockopt
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
