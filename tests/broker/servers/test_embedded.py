"""The embedded server: many chunks, busy ports, a clean end, and the command's signals."""

import os
import signal
import socket
import subprocess
import sys
import threading

import children
import pytest
from servers import free_port, wait_for_port

from fleetune.broker.servers.embedded import EmbeddedServer, serve
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.link import Link


@pytest.mark.parametrize("port", [-1, 2**16, 2**64])
def test_a_port_that_none_can_be_is_told(port):
    for start in (EmbeddedServer, serve):
        with pytest.raises(ConfigError, match=f"port {port}: expected 0 to 65535"):
            start(port=port)


def test_it_carries_chunks_both_ways_between_many(embedded):
    links = [Link(embedded.url, client_id=f"d{i}", topics=[f"{i}/down"]) for i in range(4)]
    content = os.urandom(CHUNK_BYTES)
    with Link(embedded.url, client_id="aggregator", topics=["+/up"]) as aggregator:
        for link in links:
            link.open()
        for _ in range(10):
            for i, link in enumerate(links):
                link.publish(f"{i}/up", content)
                aggregator.publish(f"{i}/down", content)
        heard = [aggregator.receive(10) for _ in range(40)]
        assert sorted(heard) == sorted((f"{i}/up", content) for i in range(4) for _ in range(10))
        for i, link in enumerate(links):
            assert [link.receive(10) for _ in range(10)] == [(f"{i}/down", content)] * 10
            link.close()


def test_it_ends_and_frees_its_port_and_thread():
    before = threading.active_count()
    with EmbeddedServer() as server:
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with EmbeddedServer(server.port) as again:
        assert again.port == server.port


def test_a_busy_port_is_told():
    with (
        EmbeddedServer() as server,
        pytest.raises(TransportError, match=rf"127.0.0.1:{server.port}: Address already in use"),
    ):
        EmbeddedServer(server.port).start()


def test_an_address_of_another_machine_is_told():
    with pytest.raises(TransportError, match="Cannot assign requested address"):
        EmbeddedServer(1883, host="192.0.2.1").start()


def test_connections_that_say_nonsense_do_no_harm(embedded, caplog):
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\x7f", b"\x00" * 100):
        with socket.create_connection(("127.0.0.1", embedded.port)) as connection:
            connection.sendall(words)
    with Link(embedded.url, client_id="a", topics=["x"]) as link:
        link.publish("x", b"still here")
        assert link.receive(10) == ("x", b"still here")
    assert caplog.text == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_on_a_signal(number):
    port = free_port()
    command = [
        sys.executable,
        "-c",
        f"from fleetune.broker.servers.embedded import serve; serve(port={port})",
    ]
    with children.start(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_port(port, process)
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_the_command_on_a_busy_port_is_told(embedded):
    with pytest.raises(TransportError, match="Address already in use"):
        serve(port=embedded.port)
