"""TLS of a connection: what is trusted, what is shown, and what a handshake that fails means; alone imports ssl."""

import contextlib
import logging
import os
import socket
import ssl
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.address import Address
from fleetune.device_runtime.network.expiry import expiry_warning

log = logging.getLogger(__name__)

Context = ssl.SSLContext
HandshakeError = ssl.SSLError
KEY_PASSWORD = "FLEETUNE_MQTT_KEY_PASSWORD"

_TIMEOUT_S = 5.0
_LISTEN_S = 2.0
_ASKED = "it asks for a client certificate: give --cert and --key"
_NO_TLS = "it seems to speak no TLS on this port; without TLS the address begins with mqtt:// or ws://"
_OF_OURS = (
    "BAD_CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN", "DECRYPT_ERROR",
    "UNKNOWN_CA", "UNSUPPORTED_CERTIFICATE", "ACCESS_DENIED",
)  # fmt: skip
_OF_NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "RECORD_LAYER_FAILURE",
    "HTTP_REQUEST",
    "UNEXPECTED_EOF",
    "PACKET_LENGTH",
)
_ADVICE = {
    "local issuer": "the authority that signed it is given with --ca-file FILE",
    "self": "an authority of your own is given with --ca-file FILE",
    "mismatch": "address the server by a name that stands in its certificate",
    "not valid for": "address the server by a name that stands in its certificate",
    "expired": "renew it, unless this machine's clock is wrong",
    "not yet valid": "is this machine's clock right?",
}

_ADVICE_ON_OURS = {
    "expired": "; renew it, unless a clock is wrong",
    "revoked": "; its authority has taken it back: a new key (fleetune enrol) may be signed",
    "unknown ca": "; it wants one of an authority that it trusts, with any certificates in between behind it in that file",
}


def make_context(*, ca_file: str | None, cert: str | None, key: str | None) -> Context:
    """Trust ``ca_file``, or the system's authorities without it; show ``cert`` to a server that asks.

    A key that is encrypted is opened with ``FLEETUNE_MQTT_KEY_PASSWORD``. A certificate that ends within 30 days, and a key
    that others can read, are warned of.

    Raises:
        ConfigError: a file that cannot be read, a key without its certificate or not its own, or an encrypted one.
    """
    if key and not cert:
        raise ConfigError(f"--key {key}: give its certificate, --cert FILE")
    for path in filter(None, (ca_file, cert, key)):
        _check_readable(path)
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except HandshakeError as exc:
        raise ConfigError(
            f"{ca_file}: cannot be read as PEM certificates: there is none in it, or a damaged one"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{ca_file}: cannot be read as PEM certificates: {exc.strerror}") from exc
    if cert:
        _show(context, cert, key)
        _warn(Path(cert), Path(key or cert))
    return context


def speaks_tls(address: Address) -> bool:
    """Whether something on this port answers a TLS handshake, with whatever certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _shake_hands(address, context, listen_s=0)
    except HandshakeError as exc:
        return "ALERT" in (exc.reason or "")
    except OSError:
        return False
    return True


def trouble(address: Address, context: Context) -> str:
    """Why the handshake of a server that hangs up fails; empty if that is not the reason, or cannot be known."""
    try:
        _shake_hands(address, context, listen_s=_LISTEN_S)
    except HandshakeError as exc:
        return explain(exc)
    except ConnectionResetError:
        return _NO_TLS
    except OSError:
        return ""
    return ""


def why_hung_up(address: Address, context: Context | None) -> str:
    """Look at a server that hangs up, with TLS (``context``) or without; say why, as far as that can be known.

    Raises:
        TransportError: the reason is one that will not change.
    """
    if context:
        return raise_if_final(address, trouble(address, context)) or "it hangs up"
    if speaks_tls(address):
        secure = "wss" if address.is_websocket else "mqtts"
        raise TransportError(
            f"{address.shown}: the server speaks TLS on this port; address it as {secure}://{address.host}:{address.port}"
        )
    return "it hangs up"


def is_final(words: str) -> bool:
    """Whether what :func:`explain` said will not pass by itself."""
    return words == _ASKED or words.startswith(("its certificate", "it does not take"))


def raise_if_final(address: Address, words: str) -> str:
    """Return what :func:`explain` said, or raise it as a TransportError if it will not pass by itself."""
    if is_final(words):
        raise TransportError(f"{address.shown}: {words}")
    return words


def explain(exc: HandshakeError) -> str:
    """Plain words for a failed handshake."""
    if isinstance(exc, ssl.SSLCertVerificationError):
        words = exc.verify_message.rstrip(".")
        advice = next((text for part, text in _ADVICE.items() if part in words), "")
        return f"its certificate is not trusted: {words}" + (f"; {advice}" if advice else "")
    reason = exc.reason or str(exc)
    if "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason:
        return _ASKED
    if any(name in reason for name in _OF_NO_TLS) or isinstance(exc, ssl.SSLEOFError):
        return _NO_TLS
    plain = reason.lower().replace("_", " ")
    if "ALERT" in reason and any(name in reason for name in _OF_OURS):
        advice = next((text for part, text in _ADVICE_ON_OURS.items() if part in plain), "")
        return f"it does not take the client certificate of --cert: {plain}{advice}"
    return f"the TLS handshake fails: {plain}"


def _shake_hands(address: Address, context: Context, *, listen_s: float) -> None:
    """Raise what TLS says; with TLS 1.3 a server judges a client's certificate only after the client's handshake."""
    with (
        socket.create_connection((address.host, address.port), _TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as wrapped,
    ):
        wrapped.settimeout(listen_s)
        with contextlib.suppress(TimeoutError, ssl.SSLWantReadError):
            wrapped.recv(1)


def _check_readable(path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read as PEM certificates: {exc.strerror}") from exc


def _warn(cert: Path, key: Path) -> None:
    if words := expiry_warning(cert, datetime.now(timezone.utc)):
        log.warning("certificate %s", words)
    mode = key.stat().st_mode
    if mode & 0o077:
        log.warning("key %s: other users of this machine can read it; chmod 600 %s", key, key)


def _show(context: Context, cert: str, key: str | None) -> None:
    asked: list[bool] = []

    def password() -> str:
        asked.append(True)
        return os.environ.get(KEY_PASSWORD, "")

    try:
        context.load_cert_chain(cert, key, password)
    except (OSError, HandshakeError, ValueError) as exc:
        where = f"{cert}, {key}" if key else cert
        raise ConfigError(
            f"{where}: {_why_not_shown(exc, has_key=bool(key), is_locked=bool(asked))}"
        ) from exc


def _why_not_shown(exc: Exception, *, has_key: bool, is_locked: bool) -> str:
    reason = getattr(exc, "reason", "") or ""
    if is_locked:
        wrong = "is wrong" if os.environ.get(KEY_PASSWORD) else "is not set"
        return f"the key is encrypted and its password, {KEY_PASSWORD}, {wrong}"
    if "MISMATCH" in reason:
        return "the key is not that of the certificate"
    if not has_key:
        return "not a PEM certificate with its private key; give the key with --key FILE"
    return "not a PEM certificate and its private key"


def receive(opened: Any, room: memoryview) -> int:
    """Write what has come of a connection to ``room``, and return how many bytes; 0 at its end.

    It is what one call of the system brings; of TLS, which gives a record at a time, all that has come.

    Raises:
        OSError: the connection is lost; BlockingIOError if nothing has come.
    """
    count = 0
    try:
        count = more = opened.recv_into(room)
        while more and count < len(room) and isinstance(opened, ssl.SSLSocket):
            more = opened.recv_into(room[count:])
            count += more
    except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as exc:
        if not count:
            raise BlockingIOError from exc
    return count
