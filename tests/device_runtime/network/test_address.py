"""Addresses: defaults, logins, refusals without secrets."""

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.address import parse_url


@pytest.mark.parametrize(
    ("url", "shown", "path"),
    [
        ("mqtt://host", "mqtt://host:1883", "/mqtt"),
        ("mqtts://u:p@host:99", "mqtts://host:99", "/mqtt"),
        ("ws://host/", "ws://host:80", "/mqtt"),
        ("wss://host/a/b", "wss://host:443", "/a/b"),
        ("mqtt://[::1]:5", "mqtt://::1:5", "/mqtt"),
    ],
)
def test_what_an_address_leaves_out(url, shown, path):
    address = parse_url(url)
    assert (address.shown, address.path, address.versions) == (shown, path, ("5", "3.1.1"))


def test_a_login_may_hold_any_character():
    address = parse_url("mqtt://a%40b:p%2F%3A%23@host?version=3.1.1")
    assert (address.username, address.password, address.versions) == ("a@b", "p/:#", ("3.1.1",))


def test_the_environment_serves_where_the_url_has_no_user(monkeypatch):
    monkeypatch.setenv("FLEETUNE_MQTT_USERNAME", "ann")
    monkeypatch.setenv("FLEETUNE_MQTT_PASSWORD", "secret")
    assert parse_url("mqtt://host")[4:6] == ("ann", "secret")
    assert parse_url("mqtt://bob@host")[4:6] == ("bob", None)


@pytest.mark.parametrize(
    "url",
    ["", "host", "host:1883", "http://u:secret@host", "mqtt://", "mqtt://u:secret@host:0x1", "mqtt://u:secret@host:99999",
     "mqtt://host?version=4", "mqtt://host?clean=1"],
)  # fmt: skip
def test_a_bad_address_is_refused_without_its_secret(url):
    with pytest.raises(ConfigError, match="expected") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)
