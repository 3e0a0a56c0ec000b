"""The link against real servers: round trips, restarts, wills, logins, limits, WebSocket, TLS, and silence."""

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import pytest
from bad_link import Cuts
from servers import Mosquitto, free_port, password_file
from waiting import until

from fleetune.broker.servers.embedded import EmbeddedServer
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.contracts.wire import Chunk, device_topic, encode
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network import link as link_module
from fleetune.device_runtime.network.link import QUEUED_MAX, Link, Will


def take(link: Link, count: int, timeout_s: float = 20) -> list[tuple[str, bytes]]:
    deadline, taken = time.monotonic() + timeout_s, []
    while len(taken) < count:
        assert time.monotonic() < deadline, f"{len(taken)} of {count} messages came"
        if message := link.receive(0.2):
            taken.append(message)
    return taken


def test_messages_arrive_in_order_whole_and_counted(mqtt_url):
    sent = [os.urandom(CHUNK_BYTES) for _ in range(80)]
    with Link(mqtt_url, client_id="b", topics=["j/+/up"]) as b, Link(mqtt_url, client_id="a", topics=[]) as a:
        for content in sent:
            a.publish("j/a/up", content)
        assert take(b, 80) == [("j/a/up", content) for content in sent]
        assert a.bytes_sent == b.bytes_received == 80 * CHUNK_BYTES
        assert (a.connections, b.connections, b.dropped) == (1, 1, 0)
        assert b.receive(0) is None
        assert a.flush(10)


def test_a_server_of_3_1_1_is_found_out_soon(embedded):
    url = f"mqtt://127.0.0.1:{embedded.port}"
    with Link(url, client_id="a", topics=["x"], will=Will("status", b"gone")) as link:
        link.publish("x", b"hello")
        assert take(link, 1) == [("x", b"hello")]


def test_retained_messages_reach_those_who_come_later(mqtt_url):
    with Link(mqtt_url, client_id="a", topics=[]) as a:
        a.publish("status", b"here", retain=True)
    with Link(mqtt_url, client_id="b", topics=["status"]) as b:
        assert take(b, 1) == [("status", b"here")]


def test_what_a_stranger_has_the_server_keep_is_not_read(mqtt_url):
    """Statuses alone are retained: MQTT 5 leaves the rest at the server, of 3.1.1 it is dropped when it comes."""
    with Link(mqtt_url, client_id="stranger", topics=[]) as stranger:
        for number in range(50):
            stranger.publish(f"j/{number}/up", b"x" * 1000, retain=True)
        stranger.publish("j/0/status", b"kept", retain=True)
        stranger.flush(10)
    with Link(mqtt_url, client_id="b", topics=["j/+/up", "j/+/status"]) as b:
        with Link(mqtt_url, client_id="a", topics=[]) as a:
            a.publish("j/a/up", b"live")
            assert sorted(take(b, 2)) == [("j/0/status", b"kept"), ("j/a/up", b"live")]
        assert b.receive(0) is None
        assert b.bytes_received == len(b"kept") + len(b"live")  # payloads that anybody reads


def test_of_mqtt_5_it_is_not_even_sent(mosquitto, caplog):
    with Link(mosquitto.url, client_id="stranger", topics=[]) as stranger:
        stranger.publish("j/0/up", b"x", retain=True)
        stranger.publish("j/0/status", b"kept", retain=True)
        stranger.flush(10)
    with Link(mosquitto.url, client_id="b", topics=["j/+/up", "j/+/status"]) as b:
        assert take(b, 1) == [("j/0/status", b"kept")]
        b.listen("j/0/up")
        assert b.receive(0.05) is None
    assert "not read" not in caplog.text


def test_nor_is_it_of_a_server_of_3_1_1_and_it_is_told_once(embedded, caplog):
    url = f"mqtt://127.0.0.1:{embedded.port}?version=3.1.1"
    with Link(url, client_id="stranger", topics=[]) as stranger:
        for number in range(5):
            stranger.publish(f"j/{number}/up", b"x", retain=True)
        stranger.flush(10)
    with Link(url, client_id="b", topics=["j/+/up"]) as b, Link(url, client_id="a", topics=[]) as a:
        a.publish("j/a/up", b"live")
        assert take(b, 1) == [("j/a/up", b"live")]
    told = caplog.text.count("nobody of ours keeps any: not read")
    assert 1 <= told <= 2, "once a link; amqtt 0.12 sends them to links that did not ask, too"


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_restarted_server_is_found_again(mosquitto, how):
    with Link(mosquitto.url, client_id="a", topics=["x"]) as link:
        getattr(mosquitto, how)()
        until(lambda: not link.connected)
        link.publish("x", b"sent while nobody was there")
        mosquitto.start()
        until(lambda: link.connections == 2)
        assert link.connected
        assert take(link, 1) == [("x", b"sent while nobody was there")]
        link.publish("x", b"sent afterwards")
        assert take(link, 1) == [("x", b"sent afterwards")]


def test_a_reconnection_ends_the_wait_for_a_message(mosquitto):
    with Link(mosquitto.url, client_id="a", topics=["x"]) as link:
        mosquitto.kill()
        until(lambda: not link.connected)
        received = []
        waiting = threading.Thread(target=lambda: received.append(link.receive(300)), daemon=True)
        waiting.start()
        mosquitto.start()
        waiting.join(30)
        assert (received, link.connections) == ([None], 2)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_small_messages_do_not_wait_for_each_other(mosquitto, version):
    with Link(f"{mosquitto.url}?version={version}", client_id="a", topics=["x"]) as link:
        assert sends_at_once(link)
        mosquitto.kill()
        mosquitto.start()
        until(lambda: link.connections == 2)
        assert sends_at_once(link), "after a reconnection too"


def sends_at_once(link: Link) -> bool:
    with socket.socket(fileno=os.dup(link._client._paho.socket().fileno())) as same:
        return same.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_a_chunk_that_takes_longer_than_the_keep_alive_breaks_no_connection(mosquitto):
    with Cuts(mosquitto.port, after=(10**9, 10**9), bytes_s=45e3) as narrow:
        url = f"mqtt://127.0.0.1:{narrow.port}"
        with Link(url, client_id="a", topics=["x"], keepalive_s=1) as link:
            link.publish("x", bytes(CHUNK_BYTES))
            assert len(take(link, 1)) == 1
            assert (link.connections, narrow.connections) == (1, 1)


def test_a_restarted_embedded_server_is_found_again():
    with EmbeddedServer() as server:
        link = Link(server.url, client_id="a", topics=["x"])
        link.open()
    until(lambda: not link.connected)
    with EmbeddedServer(server.port):
        until(lambda: link.connections == 2)
        link.publish("x", b"again")
        assert take(link, 1) == [("x", b"again")]
        link.close()


DIES = """
import sys, time
from fleetune.device_runtime.network.link import Link, Will
Link(sys.argv[1], client_id="dies", topics=["x"], will=Will("status", b"gone")).open()
print("open", flush=True)
time.sleep(60)
"""


def test_the_will_is_published_when_the_process_is_killed(mqtt_url):
    with Link(mqtt_url, client_id="watcher", topics=["status"]) as watcher:
        command = [sys.executable, "-c", DIES, mqtt_url]
        with children.start(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "open\n"
            process.send_signal(signal.SIGKILL)
        assert take(watcher, 1) == [("status", b"gone")]
    with Link(mqtt_url, client_id="late", topics=["status"]) as late:
        assert take(late, 1) == [("status", b"gone")]  # it is retained


def test_the_will_is_not_published_after_a_goodbye(mqtt_url):
    with Link(mqtt_url, client_id="watcher", topics=["status", "end"]) as watcher:
        with Link(mqtt_url, client_id="leaves", topics=[], will=Will("status", b"gone")):
            pass
        watcher.publish("end", b"")
        assert take(watcher, 1) == [("end", b"")]


@pytest.fixture
def guarded(tmp_path, start_mosquitto) -> Mosquitto:
    passwords = password_file(tmp_path, ann="se:cret")
    return start_mosquitto("allow_anonymous false", f"password_file {passwords}")


@pytest.mark.parametrize("version", ["5", "3.1.1"])
@pytest.mark.parametrize(("login", "said"), [("", "without a user name"), ("ann:wrong@", "user 'ann'")])
def test_a_refused_login_is_told_at_once(guarded, version, login, said):
    url = f"mqtt://{login}127.0.0.1:{guarded.port}?version={version}"
    with pytest.raises(TransportError, match=f"refuses .*{said}: Not authorized") as caught:
        Link(url, client_id="a", topics=[]).open()
    assert "wrong" not in str(caught.value)


def test_a_login_comes_from_the_url_or_the_environment(guarded, monkeypatch):
    with Link(f"mqtt://ann:se%3Acret@127.0.0.1:{guarded.port}", client_id="a", topics=["x"]) as link:
        assert link.connected
    monkeypatch.setenv("FLEETUNE_MQTT_USERNAME", "ann")
    monkeypatch.setenv("FLEETUNE_MQTT_PASSWORD", "se:cret")
    with Link(guarded.url, client_id="a", topics=["x"]) as link:
        assert link.connected


def test_nobody_there_is_told_after_the_time_out():
    port = free_port()
    with pytest.raises(
        TransportError, match=f"mqtt://127.0.0.1:{port}: no MQTT server answers: Connection refused"
    ):
        Link(f"mqtt://127.0.0.1:{port}", client_id="a", topics=[]).open(0.3)


def test_a_server_that_comes_late_is_waited_for(tmp_path):
    server = Mosquitto(tmp_path)
    starting = threading.Timer(0.5, server.start)
    starting.start()
    try:
        with Link(server.url, client_id="a", topics=["x"]) as link:
            assert link.connections == 1
    finally:
        starting.join()
        server.kill()


def test_a_server_that_is_none_is_told(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"mqtt://127.0.0.1:{silent.getsockname()[1]}?version=3.1.1"
        with pytest.raises(TransportError, match="takes the connection and says nothing"):
            Link(url, client_id="a", topics=[]).open(0.2)


def test_the_servers_packet_limit_sets_the_chunks(start_mosquitto):
    server = start_mosquitto("allow_anonymous true", "max_packet_size 20000")
    topic = device_topic("j" * 64, "d" * 64, "down")
    with Link(server.url, client_id="a", topics=[topic]) as link:
        assert link.chunk_bytes == 20000 - 512
        largest = encode(Chunk(sha256="f" * 64, index=99999, data=bytes(link.chunk_bytes)))
        link.publish(topic, largest)
        assert take(link, 1) == [(topic, largest)]
        with pytest.raises(TransportError, match="20001 bytes; the server takes packets of at most 20000"):
            link.publish(topic, bytes(20001))
        assert link.connections == 1


def test_packets_too_small_for_anything_are_refused(start_mosquitto):
    server = start_mosquitto("allow_anonymous true", "max_packet_size 600")
    with pytest.raises(TransportError, match="packets of at most 600 bytes are too small"):
        Link(server.url, client_id="a", topics=["x"]).open(5)


def test_a_topic_that_is_not_allowed_is_told():
    """Mosquitto's ACL file lets everyone subscribe and then sends nothing; AWS IoT answers like this server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=refuse_the_second_topic, args=(listener,), daemon=True)
        server.start()
        url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}?version=3.1.1"
        with pytest.raises(TransportError, match=r"no permission to subscribe to secret$"):
            Link(url, client_id="a", topics=["allowed", "secret"]).open(5)
        server.join(5)


def refuse_the_second_topic(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"\x20\x02\x00\x00")  # CONNACK: accepted
        subscription = connection.recv(1000)
        connection.sendall(b"\x90\x04" + subscription[2:4] + b"\x01\x80")  # SUBACK: QoS 1, failure
        while connection.recv(1000):
            pass


def test_a_topic_besides_that_is_refused_is_no_end():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=refuse_the_second_subscription, args=(listener,), daemon=True)
        server.start()
        url = f"mqtt://127.0.0.1:{listener.getsockname()[1]}?version=3.1.1"
        with Link(url, client_id="a", topics=["allowed"]) as link:
            assert link.can_listen
            link.listen("secret")
            until(lambda: not link.can_listen)
            assert link.receive(0) is None, "the link is of use"
        server.join(5)


def refuse_the_second_subscription(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(b"\x20\x02\x00\x00")  # CONNACK: accepted
        for code in (b"\x01", b"\x80"):
            connection.sendall(b"\x90\x03" + connection.recv(1000)[2:4] + code)  # SUBACK
        while connection.recv(1000):
            pass


def test_a_full_queue_drops_and_counts(mosquitto):
    with Link(mosquitto.url, client_id="a", topics=["x"], queue_size=2) as link:
        for number in range(5):
            link.publish("x", b"%d" % number)
        until(lambda: link.bytes_received == 5)
        until(lambda: link.dropped == 3)
        assert take(link, 2) == [("x", b"0"), ("x", b"1")]
        assert link.bytes_taken == 2


@pytest.mark.parametrize(
    ("version", "dropped"), [("3.1.1", 1), ("5", 0)]
)  # MQTT 5 tells the server not to send it
def test_an_oversized_message_is_dropped(mosquitto, version, dropped):
    with Link(f"{mosquitto.url}?version={version}", client_id="a", topics=["x"]) as link:
        link.publish("x", bytes(200_000))
        link.publish("x", b"small")
        assert take(link, 1) == [("x", b"small")]
        assert link.dropped == dropped


def test_a_frozen_server_blocks_neither_publish_nor_close(mosquitto, monkeypatch):
    monkeypatch.setattr(link_module, "PATIENCE_S", 0.1)
    link = Link(mosquitto.url, client_id="a", topics=[])
    link.open()
    mosquitto.freeze()
    for _ in range(QUEUED_MAX):
        link.publish("x", bytes(CHUNK_BYTES))
    with pytest.raises(TransportError, match="64 messages wait"):
        link.publish("x", b"one too many")
    assert not link.flush(0.01)
    link.close(flush_s=0.1)
    with pytest.raises(TransportError, match="not open"):
        link.publish("x", b"")


def test_a_websocket_carries_the_same(start_mosquitto):
    port, content = free_port(), os.urandom(CHUNK_BYTES)
    server = start_mosquitto("allow_anonymous true", f"listener {port}", "protocol websockets")
    with (
        Link(f"ws://127.0.0.1:{port}", client_id="a", topics=["down"]) as a,
        Link(server.url, client_id="b", topics=["up"]) as b,
    ):
        assert sends_at_once(a)
        for _ in range(20):
            a.publish("up", content)
        assert take(b, 20) == [("up", content)] * 20
        b.publish("down", content[:4000])  # Mosquitto 2.0 is slow past that: broker/servers/mosquitto.py
        assert take(a, 1) == [("down", content[:4000])]


# Paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_websocket_to_what_is_none_is_told(mosquitto):
    with pytest.raises(TransportError, match="no MQTT server answers"):
        Link(f"ws://127.0.0.1:{mosquitto.port}", client_id="a", topics=[]).open(0.2)
    gc.collect()


@pytest.fixture
def certificate(tmp_path) -> tuple[Path, Path]:
    key, pem = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-keyout",
        str(key),
        "-out",
        str(pem),
    ]
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-days", "2", *made, *subject], check=True, capture_output=True
    )
    key.chmod(0o644)
    return key, pem


def test_tls_trusts_the_authority_named_and_no_other(certificate, start_mosquitto):
    key, pem = certificate
    server = start_mosquitto("allow_anonymous true", f"certfile {pem}", f"keyfile {key}")
    url = f"mqtts://localhost:{server.port}"
    with Link(url, client_id="a", topics=["x"], ca_file=str(pem)) as link:
        assert sends_at_once(link)
        link.publish("x", b"secret")
        assert take(link, 1) == [("x", b"secret")]
    with pytest.raises(TransportError, match=r"certificate is not trusted: self.signed"):
        Link(url, client_id="a", topics=["x"]).open(5)


def test_a_ca_file_that_is_none_is_told(tmp_path):
    (tmp_path / "ca.pem").write_text("nothing")
    for path in (tmp_path / "ca.pem", tmp_path / "missing.pem"):
        with pytest.raises(
            ConfigError, match=r"cannot be read as PEM certificates: (there is none in it|No such file)"
        ):
            Link("mqtts://localhost", client_id="a", topics=[], ca_file=str(path))
