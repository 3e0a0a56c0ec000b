"""Paho's client, with a short way for the packets that nearly all are; the only file that knows what is inside of paho.

Of a round of a hundred devices the aggregator computes a sixth less by it, and so do they (docs/scale.md).
"""

import fcntl
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Protocol

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from fleetune.device_runtime.network import packets, tls
from fleetune.device_runtime.network.address import Address

RESENT_BYTES_MAX = 2048
"""Larger messages hold chunks, which who needs them asks for again: sent again first, they could break each connection anew."""
RECONNECT_S = (1, 15)
"""Shortest and longest wait before a lost connection is tried again; doubled from one try to the next."""

_ROOM_BYTES = 256 * 1024
"""Bytes that have come of a connection and are not read, at most; a larger packet is paho's to put together."""
_HAS_IT = ReasonCode(PacketTypes.PUBACK)
_NOTHING_MORE = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]
"""What paho makes anew of each acknowledgement that says no more than that."""
_VERSIONS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}
_GOOD, _LATER = MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN


class Opened(Protocol):
    """A socket, as far as it need be known here."""

    def fileno(self) -> int:
        """Its descriptor."""


class _Ringing(Protocol):
    def send(self, content: bytes) -> int: ...

    def close(self) -> None: ...


class Bell:
    """The end of paho's socket pair that wakes its thread: rung once a turn, not by the thread itself, and only if need be.

    Every byte through it costs two calls of the system, at each of which a thread may lose the interpreter to another.
    """

    def __init__(self, ringing: _Ringing, thread: threading.Thread, send_now: Callable[[], bool]) -> None:
        self._ringing, self._thread, self._send_now = ringing, thread, send_now
        self.has_rung = False
        """Since the thread looked last what there is to send."""

    def send(self, content: bytes) -> int:
        """Wake the thread, unless it is about to look, or what waits could be sent without it."""
        if self.has_rung or threading.current_thread() is self._thread or self._send_now():
            return len(content)
        self.has_rung = True
        return self._ringing.send(content)

    def close(self) -> None:
        """Close it."""
        self._ringing.close()


class Paho(paho.Client):
    """As paho's, with fewer calls of the system, and fewer objects for each of the packets that nearly all are.

    Bytes that come or arrive are a sign of life: an answer to a ping may wait behind a slow chunk.
    """

    on_letter: Callable[[str, bytes, bool], object] | None = None
    """Told (topic, payload, whether it is retained) in the place of ``on_message``, of messages of QoS 1 without properties."""
    is_stream = True
    """Whether the transport is TCP, or TLS on it: a WebSocket is paho's to read."""
    is_thread_safe = False
    """Whether one thread may write while another reads: not with OpenSSL."""
    _moved_at = 0.0
    _num_sent = _num_arrived = 0
    _bell: Bell | None = None
    _answers = b""
    """Acknowledgements of what has come in this turn, sent together at its end."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing = threading.RLock()
        """Held by who writes to the socket, or opens or closes it."""
        self._inbox = packets.Inbox(_ROOM_BYTES)
        super().__init__(*args, **kwargs)

    def reconnect(self) -> MQTTErrorCode:
        """Connect anew; until then nobody else writes."""
        with self._writing:
            return super().reconnect()

    def loop_start(self) -> MQTTErrorCode:
        """Start the thread."""
        code = super().loop_start()
        if self._thread and self._sockpairW and not self._bell:
            self._bell = Bell(self._sockpairW, self._thread, self._send_now)
            self._sockpairW = self._bell  # type: ignore[assignment]
        return code

    def loop_read(self, max_packets: int = 1) -> MQTTErrorCode:
        """Take the packets that have come, and send at once what answers them."""
        code = self._read_all() if self.is_stream else super().loop_read(max_packets)
        if self._answers:
            answers, self._answers = self._answers, b""
            self._packet_queue(packets.PUBACK, answers, 0, 1)
        return self.loop_write() if not code and self._sock and self.want_write() else code

    def loop_misc(self) -> MQTTErrorCode:
        """Look whether the connection has been silent for too long."""
        if self._ping_t > 0:
            self._look_what_arrived()
            if self._moved_at > self._ping_t:
                self._ping_t = self._moved_at
                self._note_life()
        return super().loop_misc()

    def drop_large(self) -> dict[int, int]:
        """Forget large messages on their way, which paho (2.1) would send again first and has no way to drop; sizes by number."""
        with self._out_message_mutex:
            waiting = self._out_messages
            sizes = {mid: len(m.payload) for mid, m in waiting.items() if len(m.payload) > RESENT_BYTES_MAX}
            for mid in sizes:
                del waiting[mid]
        return sizes

    def _loop(self, timeout: float = 1.0) -> MQTTErrorCode:
        if self._bell:
            self._bell.has_rung = False  # before it looks what there is to send
        return super()._loop(timeout)

    def _read_all(self) -> MQTTErrorCode:
        """Take what has come of the connection, packet by packet."""
        try:
            self._fill()
        except BlockingIOError:
            return _GOOD
        except OSError:
            return self._loop_rc_handle(MQTTErrorCode.MQTT_ERR_CONN_LOST)
        code = _GOOD
        while self._sock and code == _GOOD:
            code = self._read_one()
        return _GOOD if code in (_GOOD, _LATER) else self._loop_rc_handle(code)

    def _read_one(self) -> MQTTErrorCode:
        """Take the first packet; _LATER if it is not all there."""
        if self._in_packet["command"]:
            return self._packet_read()
        try:
            packet = self._inbox.packet()
        except ValueError:
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        if packet is None:
            return self._packet_read() if self._inbox.is_full else _LATER
        code = self._take(packet)
        if code is None:
            return self._packet_read()
        self._inbox.drop(packet)
        return code

    def _packet_handle(self) -> MQTTErrorCode:
        """Take a packet that paho has put together: from a WebSocket, or larger than there is room for."""
        body = self._in_packet["packet"]
        code = self._take(packets.Packet(self._in_packet["command"], body, len(body)))
        return super()._packet_handle() if code is None else code

    def _take(self, packet: packets.Packet) -> MQTTErrorCode | None:
        """Take a message or an acknowledgement; None if it has more to say than most: paho reads it."""
        if (number := packets.acknowledged(packet)) is not None:
            with self._out_message_mutex:
                if number in self._out_messages:
                    return self._do_on_publish(number, _HAS_IT, _NOTHING_MORE)
            return _GOOD
        if not self.on_letter:
            return None
        letter = packets.letter_of(packet, is_v5=self._protocol == MQTTProtocolVersion.MQTTv5)
        if letter is None:
            return None
        self.on_letter(letter.topic, letter.payload, letter.is_retained)
        self._answers += packets.acknowledgement(letter)
        return _GOOD

    def _send_publish(
        self,
        mid: int,
        topic: bytes,
        payload: bytes | bytearray = b"",
        qos: int = 0,
        retain: bool = False,
        dup: bool = False,
        info: paho.MQTTMessageInfo | None = None,
        properties: Properties | None = None,
    ) -> MQTTErrorCode:
        if qos != 1 or properties is not None or self._sock is None:
            return super()._send_publish(mid, topic, payload, qos, retain, dup, info, properties)
        flags = dup << 3 | qos << 1 | retain
        is_v5 = self._protocol == MQTTProtocolVersion.MQTTv5
        content = packets.publication(topic, payload, mid, flags=flags, is_v5=is_v5)
        return self._packet_queue(packets.PUBLISH, content, mid, qos, info)

    def _packet_write(self) -> MQTTErrorCode:
        with self._writing:
            self._join_small()
            return super()._packet_write()

    def _send_now(self) -> bool:
        """Send what waits from the thread that publishes; False if any of it is left to the client's own."""
        if not (self.is_thread_safe and self.is_connected() and self._writing.acquire(blocking=False)):
            return False
        try:
            return self._packet_write() == _GOOD and not self._out_packet
        finally:
            self._writing.release()

    def _join_small(self) -> None:
        """Have small packets that wait behind each other sent at once; paho does nothing more once one of these has left."""
        if len(self._out_packet) < 2:
            return
        waiting = [self._out_packet.popleft() for _ in range(len(self._out_packet))]  # others may add to it
        runs = ((is_small, [*run]) for is_small, run in groupby(waiting, _is_joined))
        joined = [one for is_small, run in runs for one in (_joined(run) if is_small else run)]
        self._out_packet.extendleft(reversed(joined))

    def _fill(self) -> None:
        """Read what has come; BlockingIOError if nothing has, another OSError if nothing will."""
        if not self._inbox.fill(self._receive):
            raise ConnectionResetError
        self._moved_at = time.monotonic()
        self._note_life()

    def _receive(self, room: memoryview) -> int:
        if self._sock is None:
            raise ConnectionResetError
        return tls.receive(self._sock, room)

    def _note_life(self) -> None:
        for name in ("_last_bytes_received", "_last_msg_in"):  # of paho 2.2, and of 2.1
            setattr(self, name, max(getattr(self, name, 0.0), self._moved_at))

    def _look_what_arrived(self) -> None:
        arrived = self._num_sent - _num_underway(self._sock)
        if arrived != self._num_arrived:
            self._num_arrived, self._moved_at = arrived, time.monotonic()

    def _sock_recv(self, bufsize: int) -> bytes:
        if self.is_stream:
            if not len(self._inbox):
                self._fill()
            return self._inbox.take(bufsize)
        content = super()._sock_recv(bufsize)
        self._moved_at = time.monotonic()
        return content

    def _sock_send(self, buf: bytes | bytearray) -> int:
        sent = super()._sock_send(buf)
        self._num_sent += sent
        return sent

    def _sock_close(self) -> None:
        self._inbox.clear()
        self._answers = b""
        with self._writing:
            super()._sock_close()


def new_paho(address: Address, client_id: str, *, is_v5: bool) -> Paho:
    """Make a client that is not connected; what it does is its user's to say."""
    client = Paho(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=_VERSIONS["5" if is_v5 else "3.1.1"],
        transport="websockets" if address.is_websocket else "tcp",
    )
    client.reconnect_delay_set(*RECONNECT_S)
    client.max_queued_messages_set(0)  # without limit: the link has one of its own
    client.is_thread_safe = not (address.is_websocket or address.is_tls)
    if address.is_websocket:
        client.is_stream = False
        client.ws_set_options(path=address.path)
    if address.username:
        client.username_pw_set(address.username, address.password)
    return client


def _is_joined(packet: Mapping[str, Any]) -> bool:
    """Whether this may leave together with others: small, of QoS 1 and not begun."""
    is_known = packet["command"] & 0xF0 in (packets.PUBLISH, packets.PUBACK)
    return is_known and packet["qos"] == 1 and packet["pos"] == 0 and len(packet["packet"]) < RESENT_BYTES_MAX


def _joined(run: Sequence[Any]) -> list[Any]:
    content = b"".join(packet["packet"] for packet in run)
    return [{**run[0], "packet": content, "to_process": len(content)}]


def _num_underway(opened: Opened | None) -> int:
    """Bytes that the system holds for the other end, which has not acknowledged them; 0 where it does not say."""
    try:
        found = fcntl.ioctl(opened.fileno(), termios.TIOCOUTQ, bytes(4)) if opened else bytes(4)
    except OSError:
        return 0
    return int.from_bytes(found, sys.byteorder)
