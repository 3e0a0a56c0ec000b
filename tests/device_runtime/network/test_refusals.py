"""What a server refuses, told in plain words: by a Mosquitto with an access list, and by servers of a few bytes."""

import contextlib
import socket
import threading
import time

import pytest
from servers import password_file
from waiting import until

from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network import interruptions
from fleetune.device_runtime.network.hooks import Party
from fleetune.device_runtime.network.link import Link, Will
from fleetune.device_runtime.network.refusals import explain, passes

PARTY = Party(denied="let user 'ann' write there", taken="another device named 'a' uses this id")


def fate_of(link, timeout_s=20):
    """Receive until the link says that it is of no more use."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        link.receive(0.5)


@pytest.fixture
def restricted(tmp_path, start_mosquitto):
    """A Mosquitto where ann may read and write below ``own``, and read what nobody lets her write."""
    passwords, acl = password_file(tmp_path, ann="secret"), tmp_path / "acl"
    acl.write_text("user ann\ntopic readwrite own/#\ntopic read others/#\n")
    return start_mosquitto("allow_anonymous false", f"password_file {passwords}", f"acl_file {acl}")


def test_a_denied_message_ends_a_link_and_says_what_to_do(restricted):
    with Link(
        f"mqtt://ann:secret@127.0.0.1:{restricted.port}", client_id="a", topics=["own/x"], party=PARTY
    ) as link:
        link.publish("own/x", b"hello")
        assert link.receive(10) == ("own/x", b"hello")
        link.publish("others/x", b"forged")
        with pytest.raises(
            TransportError, match="refuses a message of a: Not authorized; let user 'ann' write there"
        ):
            link.receive(10)
        with pytest.raises(TransportError, match="Not authorized"):
            link.publish("own/x", b"more")


def test_a_login_that_was_taken_away_is_tried_for_a_while_and_then_told(
    restricted, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr("fleetune.device_runtime.network.standing._REFUSED_S", 1.5)
    with Link(f"mqtt://ann:secret@127.0.0.1:{restricted.port}", client_id="a", topics=["own/x"]) as link:
        restricted.stop()
        password_file(tmp_path, ann="another")
        restricted.start()
        with pytest.raises(TransportError, match="refuses user 'ann': Not authorized; check the user name"):
            fate_of(link)
    assert "secret" not in caplog.text


class Server:
    """Answers what is told to, in MQTT 5: CONNACK, SUBACK, and ``after`` whatever is published first."""

    def __init__(self, *, connack=0, suback=1, after=b""):
        self.connack, self.suback, self.after = connack, suback, after
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self.listener.getsockname()[1]}?version=5"
        self.num_connections = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self.num_connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, contextlib.suppress(OSError):
            while packet := connection.recv(4096):
                match packet[0] >> 4:
                    case 1:
                        connection.sendall(bytes([0x20, 3, 0, self.connack, 0]))
                    case 8:
                        connection.sendall(bytes([0x90, 4]) + packet[2:4] + bytes([0, self.suback]))
                    case 3:
                        number = 4 + packet[3]  # type, length, topic with its two bytes of length
                        answer = bytes(packet[number : number + 2]) if b"ID" in self.after else b""
                        connection.sendall(self.after.replace(b"ID", answer))


@pytest.fixture
def serve():
    opened = []

    def start(**answers):
        opened.append(Server(**answers))
        return opened[-1]

    yield start
    for server in opened:
        server.listener.close()


def puback(code):
    return b"\x40\x04ID" + bytes([code, 0])


def disconnect(code):
    return bytes([0xE0, 2, code, 0])


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (0x85, "Client identifier not valid; give another --id"),
        (0x86, "Bad user name or password; check the user name"),
        (0x8A, "Banned; the server's operator has banned"),
        (0x95, "Packet too large; raise the server's limit"),
        (0x9A, "Retain not supported; fleetune needs retained messages"),
        (0x9D, "Server moved; the server has moved"),
    ],
)
def test_who_is_not_let_in_is_told_why_at_once(serve, code, said):
    with pytest.raises(TransportError, match=f"refuses client 'a' without a user name: {said}"):
        Link(serve(connack=code).url, client_id="a", topics=["x"]).open(60)


@pytest.mark.parametrize(
    ("code", "said"),
    [(0x88, "Server unavailable; the server is not available now"), (0x97, "Quota exceeded; .*raise it")],
)
def test_what_may_pass_is_waited_for(serve, code, said):
    server = serve(connack=code)
    with pytest.raises(TransportError, match=f"no MQTT server answers: {said}"):
        Link(server.url, client_id="a", topics=["x"]).open(4)
    assert server.num_connections > 1


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (puback(0x87), "refuses a message of a: Not authorized; let user 'ann' write there"),
        (puback(0x90), "refuses a message of a: Topic name invalid; the server does not allow topics"),
        (disconnect(0x87), "refuses the connection of a: Not authorized; let user 'ann'"),
        (disconnect(0x95), "refuses the connection of a: Packet too large; raise"),
        (disconnect(0x9C), "refuses the connection of a: Use another server; the server sends"),
    ],
)
def test_what_will_not_pass_ends_a_link_with_its_reason(serve, after, said):
    with Link(serve(after=after).url, client_id="a", topics=["x"], party=PARTY) as link:
        link.publish("x", b"hello")
        with pytest.raises(TransportError, match=said):
            link.receive(10)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (puback(0x97), "refuses a message of a: Quota exceeded; the server's quota"),
        (disconnect(0x96), "refuses the connection of a: Message rate too high; the server's limit"),
        (disconnect(0x8B), "refuses the connection of a: Server shutting down"),
    ],
)
def test_what_may_pass_is_told_once_and_tried_again(serve, after, said, caplog):
    with Link(serve(after=after).url, client_id="a", topics=["x"]) as link:
        for _ in range(3):
            link.publish("x", b"hello")
        until(lambda: said in caplog.text)
        until(lambda: link.connected)
        assert link.receive(0) is None
        assert caplog.text.count(said) == 1


def test_a_subscription_that_is_denied_after_a_reconnection_ends_a_link(serve):
    server = serve(after=disconnect(0x8B))
    with Link(server.url, client_id="a", topics=["x"], party=PARTY) as link:
        server.suback = 0x87
        link.publish("x", b"hello")
        with pytest.raises(
            TransportError, match="no permission to subscribe to x; let user 'ann' write there"
        ):
            fate_of(link)


def test_every_reason_of_mqtt_5_has_words():
    for code in range(0x80, 0xA3):
        assert explain(code, "Name", denied="do this").startswith("Name")
    assert passes(0x97)
    assert not passes(0x87)


def holder(url, name, **options):
    """A link that says, retained, who it is whenever it has connected, as devices do."""
    status = f"{name} is here".encode()
    party = PARTY._replace(is_other=lambda payload: payload.endswith(b"is here") and payload != status)
    link = Link(
        url,
        client_id="same",
        topics=["x"],
        will=Will("status", b"nobody is here now"),
        party=party,
        **options,
    )
    link.open()
    stop = threading.Event()

    def tell():
        seen = 0
        while not stop.wait(0.02):
            if link.connections != seen and link.connected:
                seen = link.connections
                with contextlib.suppress(TransportError):
                    link.publish("status", status, retain=True)

    threading.Thread(target=tell, daemon=True).start()
    return link, stop


def failure_of(link):
    try:
        link.receive(0)
    except TransportError as exc:
        return str(exc)
    return ""


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_of_two_with_one_client_id_one_stops_and_says_why(mosquitto, version):
    """Mosquitto 2.0.11 hangs up on the first without a word."""
    url = f"{mosquitto.url}?version={version}"
    (a, stop_a), (b, stop_b) = holder(url, "a"), holder(url, "b")
    try:
        until(lambda: failure_of(a) or failure_of(b), 40)
        said = failure_of(a) or failure_of(b)
        assert said.endswith("the session of same was taken over: another device named 'a' uses this id")
        other = a if failure_of(b) else b
        until(lambda: other.connected)
        until(lambda: failure_of(other) == "", 1)
    finally:
        stop_a.set()
        stop_b.set()
        a.close()
        b.close()


def test_a_link_that_is_cut_again_and_again_goes_on(mosquitto):
    """Nobody else is there: a proxy cuts each connection as soon as it stands."""
    with Proxy(mosquitto.port) as proxy:
        link, stop = holder(f"mqtt://127.0.0.1:{proxy.port}", "a")
        try:
            for _ in range(3):
                until(lambda: link.connected, 40)
                proxy.cut()
                until(lambda: not link.connected)
            until(lambda: link.connected, 40)
            assert failure_of(link) == ""
        finally:
            stop.set()
            link.close()


def test_who_takes_over_his_own_dead_session_goes_on(mosquitto):
    with Proxy(mosquitto.port) as proxy:
        dead, stop = holder(f"mqtt://127.0.0.1:{proxy.port}", "a")
        stop.set()
        proxy.freeze()
        link, stop = holder(mosquitto.url, "a restarted")
        try:
            until(lambda: link.connected)
            assert (link.receive(1), failure_of(link), link.connections) == (None, "", 1)
        finally:
            stop.set()
            link.close()
            dead.close(flush_s=0)


def test_a_server_that_is_away_is_told_of_and_its_return_too(mosquitto, monkeypatch, caplog):
    monkeypatch.setattr(interruptions, "AWAY_S", 0.3)
    with Link(mosquitto.url, client_id="a", topics=["x"]) as link:
        mosquitto.kill()
        until(lambda: "no connection for 1 s" in caplog.text)
        mosquitto.start()
        until(lambda: link.connections == 2)
        until(lambda: "connected again after" in caplog.text)
    assert all(record.levelname == "WARNING" for record in caplog.records if "connect" in record.message[30:])


class Proxy:
    """Passes bytes on to a port, until it cuts or freezes what it has."""

    def __init__(self, port):
        self._to, self._pairs, self._is_frozen = port, [], False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._listener.close()
        self.cut()

    def cut(self):
        for end in self._pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def freeze(self):
        self._is_frozen = True

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._pairs += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if not self._is_frozen:
                    sink.sendall(data)
            if not self._is_frozen:
                sink.shutdown(socket.SHUT_RDWR)
