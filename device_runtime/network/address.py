"""The address of an MQTT server: a URL, with the login in it or in the environment."""

import os
from typing import Annotated, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

import msgspec

from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import Option

USERNAME = "FLEETUNE_MQTT_USERNAME"
PASSWORD = "FLEETUNE_MQTT_PASSWORD"
VERSIONS = ("5", "3.1.1")

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How the MQTT server is reached, beside its URL."""

    ca_file: Annotated[
        str, Option("PEM file of the authorities to trust for mqtts and wss", metavar="FILE")
    ] = ""
    timeout_s: Annotated[float, Option("seconds to wait for the MQTT server at the start", at_least=0)] = 20.0


class Address(NamedTuple):
    """A parsed URL; ``shown`` has no secrets."""

    scheme: str
    host: str
    port: int
    path: str
    """Of a WebSocket."""
    username: str | None
    password: str | None
    versions: tuple[str, ...]
    """Versions of MQTT to try, in this order."""

    @property
    def shown(self) -> str:
        """Return what messages may name."""
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme in ("mqtts", "wss")

    @property
    def is_websocket(self) -> bool:
        """Whether MQTT goes through a WebSocket."""
        return self.scheme in ("ws", "wss")


def parse_url(url: str) -> Address:
    """Parse ``scheme://[user[:password]@]host[:port][/path][?version=3.1.1]``.

    Without a user in the URL, ``FLEETUNE_MQTT_USERNAME`` and ``FLEETUNE_MQTT_PASSWORD`` hold the login.

    Raises:
        ConfigError: another scheme, no host, a bad port or option; the message has no secrets.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as exc:
        raise ConfigError(f"MQTT address: {exc}; expected mqtt://host[:port]") from exc
    if parts.scheme not in _PORTS or not host:
        got = f"scheme {parts.scheme!r}, host {host!r}"
        raise ConfigError(f"MQTT address: expected mqtt://host[:port], schemes {choices(_PORTS)}; got {got}")
    path = parts.path if parts.path not in ("", "/") else "/mqtt"
    return Address(parts.scheme, host, port or _PORTS[parts.scheme], path, *_login(parts), _versions(parts))


def _login(parts: SplitResult) -> tuple[str | None, str | None]:
    if parts.username:
        return unquote(parts.username), unquote(parts.password) if parts.password else None
    return os.environ.get(USERNAME) or None, os.environ.get(PASSWORD) or None


def _versions(parts: SplitResult) -> tuple[str, ...]:
    if not parts.query:
        return VERSIONS
    key, _, version = parts.query.partition("=")
    if key != "version" or version not in VERSIONS:
        raise ConfigError(
            f"MQTT address: expected ?version= and one of {choices(VERSIONS)}; got ?{parts.query}"
        )
    return (version,)
