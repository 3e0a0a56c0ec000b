"""Addresses: defaults, logins, refusals without secrets."""

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.address import parse_url, without_logins


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


def test_the_environments_password_serves_a_user_in_the_url(monkeypatch):
    monkeypatch.setenv("FLEETUNE_MQTT_PASSWORD", "s/#?")
    assert parse_url("mqtt://kitchen@host")[4:6] == ("kitchen", "s/#?")
    monkeypatch.setenv("FLEETUNE_MQTT_USERNAME", "kitchen")
    assert parse_url("mqtt://kitchen@host")[4:6] == ("kitchen", "s/#?")


USERS = ("kitchen", "kit/chen", "kit?chen", "kit#chen", "kit[chen")
PASSWORDS = (
    "12/34",
    "12?34",
    "12#34",
    "12[34",
    "12]/34",
    "%ff34",
    "a/b@c",
    "a?b=c",
    "#",
    "12?version=5",
    "12://34",
    "s\t34",
)


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws", "wss"])
@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("password", PASSWORDS)
def test_a_login_that_is_not_encoded_is_refused_or_right_and_never_shown(scheme, user, password):
    """With a number before the slash, urlsplit takes user and password for host and port."""
    with pytest.raises(ConfigError, match=r"percent-encoded.*FLEETUNE_MQTT_PASSWORD") as caught:
        parse_url(f"{scheme}://{user}:{password}@server")
    told = f"{caught.value!r} {caught.value.__cause__}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert not [part for part in ("kit", "12", "34", "a/b", "c@", "server") if part in told]


def test_nothing_that_shows_an_address_shows_its_secrets():
    address = parse_url("mqtt://ann:s3cret@host")
    shown = f"{address} {address!r} {address.shown} {[address]}"
    assert "s3cret" not in shown
    assert "ann" not in shown


@pytest.mark.parametrize("password", ["a@b", "a:b", "a%40b", "100%", "p&=+;,!$'()*"])
def test_other_characters_of_a_password_need_no_care(password):
    assert parse_url(f"mqtt://ann:{password}@host").password == password.replace("%40", "@")


@pytest.mark.parametrize(
    "url",
    ["", "mqtt://:secret@host", "ann:secret@host", "mqtt://host/topic", "mqtt://host#x", "mqtt://host?x=1#secret", "host",
     "host:1883", "http://u:secret@host", "mqtt://", "mqtt://u:secret@host:0x1", "mqtt://u:secret@host:99999",
     "mqtt://host?version=4", "mqtt://host?clean=1"],
)  # fmt: skip
def test_a_bad_address_is_refused_without_its_secret(url):
    with pytest.raises(ConfigError, match="expected") as caught:
        parse_url(url)
    assert "secret" not in str(caught.value)


def test_what_an_address_looks_like_is_told_whole():
    with pytest.raises(ConfigError) as caught:
        parse_url("mqtt://kitchen:a/b@server")
    assert without_logins(str(caught.value)) == str(caught.value)
    assert "expected mqtt://host[:port]" in str(caught.value)
