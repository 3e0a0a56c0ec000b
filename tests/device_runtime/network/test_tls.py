"""TLS against a real Mosquitto: certificates shown and asked for, trusted or not, and what is told when it fails."""

import gc
import os
import re
import socket
import ssl
import threading
from pathlib import Path

import pytest
from certificates import Authority

from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.link import Link


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def pairs(authority):
    """Certificates by name; ``server`` is one for 127.0.0.1."""
    return {
        "server": authority.sign("server", alternatives="IP:127.0.0.1"),
        "elsewhere": authority.sign("elsewhere"),
        "expired": authority.sign("expired", alternatives="IP:127.0.0.1", days=-1),
        "kitchen": authority.sign("kitchen"),
        "locked": authority.sign("locked", password="open sesame"),
        "strange": Authority(authority.folder / "strange", "stranger").sign("kitchen"),
    }


@pytest.fixture
def start(start_mosquitto, pairs, authority):
    """Start a Mosquitto with a certificate; with ``asks`` it takes nobody without one."""

    def begin(name="server", *, asks=False):
        pair = pairs[name]
        asking = [f"cafile {authority.cert}", "require_certificate true"] if asks else []
        return start_mosquitto(
            "allow_anonymous true", f"certfile {pair.cert}", f"keyfile {pair.key}", *asking
        )

    return begin


def link_to(port, authority, *, scheme="mqtts", **options):
    options = {"ca_file": authority.cert, **options} if scheme == "mqtts" else options
    return Link(f"{scheme}://127.0.0.1:{port}", client_id="a", topics=["x"], **options)


def test_who_shows_a_certificate_is_let_in(start, authority, pairs, tmp_path):
    server, (cert, key) = start(asks=True), pairs["kitchen"]
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    for shown in ({"cert": cert, "key": key}, {"cert": str(both)}):
        with link_to(server.port, authority, **shown) as link:
            link.publish("x", b"hello")
            assert link.receive(10) == ("x", b"hello")


@pytest.mark.parametrize("version", ["", "?version=5", "?version=3.1.1"])
def test_who_shows_none_is_told_at_once_that_one_is_asked_for(start, authority, version):
    url = f"mqtts://127.0.0.1:{start(asks=True).port}{version}"
    with pytest.raises(TransportError, match="it asks for a client certificate: give --cert and --key"):
        Link(url, client_id="a", topics=[], ca_file=authority.cert).open(60)


def test_who_shows_one_of_a_strange_authority_is_told(start, authority, pairs):
    cert, key = pairs["strange"]
    with pytest.raises(
        TransportError,
        match=r"does not take the client certificate of --cert: .*unknown ca; it wants one of an authority that it trusts",
    ):
        link_to(start(asks=True).port, authority, cert=cert, key=key).open(60)


def test_who_shows_one_that_has_expired_is_told(start, authority, pairs):
    cert, key = pairs["expired"]
    with pytest.raises(
        TransportError, match=r"does not take the client certificate of --cert: .*expired; renew it"
    ):
        link_to(start(asks=True).port, authority, cert=cert, key=key).open(60)


def test_a_server_of_tls_1_2_asks_in_the_handshake(authority, pairs):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version, context.verify_mode = ssl.TLSVersion.TLSv1_2, ssl.CERT_REQUIRED
    context.load_cert_chain(*pairs["server"])
    context.load_verify_locations(authority.cert)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=shake_hands, args=(listener, context), daemon=True).start()
        with pytest.raises(TransportError, match="it asks for a client certificate"):
            link_to(listener.getsockname()[1], authority).open(60)


def shake_hands(listener, context):
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        try:
            context.wrap_socket(connection, server_side=True).close()
        except OSError:
            connection.close()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "elsewhere",
            "is not trusted: .*mismatch.*; address the server by a name that stands in its certificate",
        ),
        (
            "expired",
            "is not trusted: certificate has expired; renew it, unless this machine's clock is wrong",
        ),
    ],
)
def test_a_wrong_certificate_is_told_with_what_to_do(start, authority, name, said):
    with pytest.raises(TransportError, match=said):
        link_to(start(name).port, authority).open(60)


def test_an_authority_that_is_not_known_is_asked_for(start, authority):
    server = start()
    with pytest.raises(
        TransportError, match=r"is not trusted: unable to get local issuer.*; .* --ca-file FILE"
    ):
        link_to(server.port, authority, ca_file=None).open(60)


def test_plain_words_to_a_tls_port_are_found_out(start, authority):
    server = start()
    for version in ("5", "3.1.1"):
        with pytest.raises(
            TransportError,
            match=f"the server speaks TLS on this port; address it as mqtts://127.0.0.1:{server.port}",
        ):
            Link(f"{server.url}?version={version}", client_id="a", topics=[]).open(60)


def test_plain_words_to_a_port_that_asks_for_certificates_are_found_out(start):
    with pytest.raises(TransportError, match="the server speaks TLS on this port"):
        Link(start(asks=True).url, client_id="a", topics=[]).open(60)


# Paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tls_to_a_plain_port_is_found_out(mosquitto, authority):
    with pytest.raises(
        TransportError,
        match="it seems to speak no TLS on this port; without TLS the address begins with mqtt://",
    ):
        link_to(mosquitto.port, authority).open(0.5)
    gc.collect()


def test_an_encrypted_key_opens_with_its_password_only(start, authority, pairs, monkeypatch):
    server, (cert, key) = start(asks=True), pairs["locked"]
    with pytest.raises(
        ConfigError, match="the key is encrypted and its password, FLEETUNE_MQTT_KEY_PASSWORD, is not set"
    ):
        link_to(server.port, authority, cert=cert, key=key)
    monkeypatch.setenv("FLEETUNE_MQTT_KEY_PASSWORD", "wrong one")
    with pytest.raises(ConfigError, match="FLEETUNE_MQTT_KEY_PASSWORD, is wrong") as caught:
        link_to(server.port, authority, cert=cert, key=key)
    assert "wrong one" not in str(caught.value)
    monkeypatch.setenv("FLEETUNE_MQTT_KEY_PASSWORD", "open sesame")
    with link_to(server.port, authority, cert=cert, key=key) as link:
        assert link.connected


def test_files_that_are_no_pair_are_told_in_one_line(authority, pairs, tmp_path):
    (tmp_path / "text").write_text("no certificate")
    cert, key = pairs["kitchen"]
    for options, said in (
        ({"cert": cert, "key": pairs["server"].key}, "the key is not that of the certificate"),
        ({"cert": cert}, "give the key with --key FILE"),
        ({"key": key}, "give its certificate, --cert FILE"),
        ({"cert": str(tmp_path / "text"), "key": key}, "not a PEM certificate and its private key"),
        (
            {"cert": cert, "key": str(tmp_path / "none")},
            "none: cannot be read as PEM certificates: No such file",
        ),
        ({"cert": str(tmp_path), "key": key}, "Is a directory"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            link_to(1, authority, **options)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_key_that_only_another_may_read_is_named(authority, pairs, tmp_path):
    key = tmp_path / "key"
    key.write_text(Path(pairs["kitchen"].key).read_text())
    key.chmod(0)
    with pytest.raises(ConfigError, match="key: cannot be read as PEM certificates: Permission denied"):
        link_to(1, authority, cert=pairs["kitchen"].cert, key=str(key))


def test_a_certificate_is_never_given_to_a_plain_connection_in_silence(authority, pairs, caplog):
    cert, key = pairs["kitchen"]
    with pytest.raises(ConfigError, match="shown over TLS only; use mqtts:// or wss://"):
        link_to(1, authority, scheme="mqtt", cert=cert, key=key)
    link_to(1, authority, scheme="mqtt", ca_file=authority.cert)
    assert "not encrypted, so --ca-file is of no use" in caplog.text


def test_a_certificate_that_ends_soon_and_a_key_that_others_read_are_told(authority, caplog):
    for days, said in (
        (20, r"ends on \d{4}-\d\d-\d\d, in (19|20) days; renew it"),
        (-1, r"ended on .*; renew it, unless"),
    ):
        pair = authority.sign(f"soon{days}", days=days)
        caplog.clear()
        link_to(1, authority, cert=pair.cert, key=pair.key)
        assert re.search(f"certificate {pair.cert}: {said}", caplog.text)
        assert f"key {pair.key}: other users of this machine can read it; chmod 600 {pair.key}" in caplog.text
    pair = authority.sign("later", days=40)
    Path(pair.key).chmod(0o600)
    caplog.clear()
    link_to(1, authority, cert=pair.cert, key=pair.key)
    assert caplog.text == ""


def test_a_message_of_many_records_comes_whole(start, authority):
    server, payload = start(), bytes(range(256)) * 400
    with link_to(server.port, authority) as link:
        for number in range(3):
            link.publish("x", bytes([number]) + payload)
        assert [link.receive(10) for _ in range(3)] == [("x", bytes([n]) + payload) for n in range(3)]
