"""The address of an MQTT server: a URL, with the login in it or in the environment."""

import os
import re
from typing import Annotated, NamedTuple
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

import msgspec

from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import Option

USERNAME = "FLEETUNE_MQTT_USERNAME"
PASSWORD = "FLEETUNE_MQTT_PASSWORD"
VERSIONS = ("5", "3.1.1")

_PORTS = {"mqtt": 1883, "mqtts": 8883, "ws": 80, "wss": 443}
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_FORM = (
    f"expected mqtt://host[:port], schemes {choices(_PORTS)}, and user:password@ before the host for a login; "
    "in a user name or password each of "
    f"/ ? # @ : % [ ] is percent-encoded (/ is %2F, # is %23), or the login is given as {USERNAME} and {PASSWORD}"
)


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How the MQTT server is reached, beside its URL."""

    ca_file: Annotated[
        str,
        Option("PEM file of the authorities to trust for mqtts and wss", metavar="FILE", alias="ca"),
    ] = ""
    cert: Annotated[
        str, Option("PEM certificate to show to a server that asks for one (mqtts, wss)", metavar="FILE")
    ] = ""
    key: Annotated[
        str, Option("private key of --cert, PEM; may be left out if it is in that file", metavar="FILE")
    ] = ""
    timeout_s: Annotated[float, Option("seconds to wait for the MQTT server at the start", at_least=0)] = 20.0


class Address(NamedTuple):
    """A parsed URL; ``shown`` and ``repr`` have no secrets."""

    scheme: str
    host: str
    port: int
    path: str
    """Of a WebSocket."""
    username: str | None
    password: str | None
    versions: tuple[str, ...]
    """Versions of MQTT to try, in this order."""

    def __repr__(self) -> str:
        return f"Address({self.shown!r})"

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

    Without a user in the URL, ``FLEETUNE_MQTT_USERNAME`` and ``FLEETUNE_MQTT_PASSWORD`` hold the login; a user without a
    password there has the environment's, unless that is another user's.

    Raises:
        ConfigError: another scheme, no host, a bad port or option; the message has no part of the URL, nor has the traceback.
    """
    try:
        return _parsed(url.strip())
    except ValueError:
        # What urlsplit says of a password with a slash, or unquote of one with %ff, would show it.
        raise ConfigError(f"MQTT address: {_FORM}{_strange_scheme(url)}") from None


def has_password(text: str) -> bool:
    """Whether a password stands in what may be an address, encoded as it should be or not."""
    return re.search(r"://[^:@\s]*:[^\s]*@", text) is not None


def without_logins(text: str) -> str:
    """Hide the login of every address in a text of which it is not known whether it holds any."""
    return re.sub(r"://\S*@", "://…@", text)


def _strange_scheme(url: str) -> str:
    scheme = re.match(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*)://", url)
    return f"; got {scheme[1]}://" if scheme and scheme[1].lower() not in _PORTS else ""


def _parsed(url: str) -> Address:
    parts = urlsplit(url)
    path = parts.path if parts.path not in ("", "/") else "/mqtt"
    versions = _versions(parts)
    port = parts.port or _PORTS.get(parts.scheme, 0)
    address = Address(parts.scheme, parts.hostname or "", port, path, *_login(parts), versions)
    if not port or not address.host or _CONTROL.search(url) or _is_cut(parts, address):
        raise ValueError
    return address


def _is_cut(parts: SplitResult, address: Address) -> bool:
    """Whether a character of the login that was not encoded ended the host: its rest is a path, query or fragment then."""
    has_path = parts.path not in ("", "/") and not address.is_websocket
    return bool(parts.fragment or has_path or "@" in parts.path or "#" in parts.query)


def _login(parts: SplitResult) -> tuple[str | None, str | None]:
    if parts.username:
        username = _decoded(parts.username)
        return username, _decoded(parts.password) if parts.password else _password_of(username)
    if parts.password:
        raise ValueError
    return os.environ.get(USERNAME) or None, os.environ.get(PASSWORD) or None


def _decoded(text: str) -> str:
    return unquote_to_bytes(text).decode()


def _password_of(username: str) -> str | None:
    """The environment's password, if that is not said to be another user's."""
    is_theirs = os.environ.get(USERNAME, username) in ("", username)
    return (os.environ.get(PASSWORD) or None) if is_theirs else None


def _versions(parts: SplitResult) -> tuple[str, ...]:
    if not parts.query:
        return VERSIONS
    key, _, version = parts.query.partition("=")
    if key != "version" or version not in VERSIONS:
        raise ConfigError(
            f"MQTT address: of ?…, version= and one of {choices(VERSIONS)} alone may stand there; {_FORM}"
        )
    return (version,)
