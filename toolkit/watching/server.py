"""Serves the page, the state and the metrics to who has the token; nobody else learns more than that something listens."""

import hmac
import logging
import secrets
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from msgspec import json

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.watching.metrics import CONTENT_TYPE, exposition
from fleetune.toolkit.watching.page import page
from fleetune.toolkit.watching.state import FleetState

log = logging.getLogger(__name__)

TOKEN_CHARS_MIN = 16
_SILENT_S = 10.0
"""A connection on which no request comes is closed after so long."""
_NO_TOKEN = b"401: this address needs the token that `fleetune watch` printed\n"


def check_token(token: str) -> str:
    """Return a token that can stand in a URL and is not guessed; ConfigError for another."""
    if (
        len(token) < TOKEN_CHARS_MIN
        or not token.isascii()
        or not token.replace("-", "").replace("_", "").isalnum()
    ):
        raise ConfigError(
            f"the token for watching has {len(token)} characters; use at least {TOKEN_CHARS_MIN} letters, digits, '-' or '_'"
        )
    return token


def make_server(host: str, port: int, *, token: str, state: Callable[[], FleetState]) -> ThreadingHTTPServer:
    """Listen, port 0 for any free one; ``serve_forever`` answers. OSError if the address is taken or not ours."""

    class Handler(_Handler):
        expected, state_of = token.encode(), staticmethod(state)

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    timeout = _SILENT_S
    expected: bytes
    state_of: Callable[[], FleetState]

    def do_GET(self) -> None:
        """Answer a request, or say 401 whatever is asked for."""
        if not self._is_known():
            self._say(HTTPStatus.UNAUTHORIZED, "text/plain; charset=utf-8", _NO_TOKEN)
            return
        path = urlsplit(self.path).path
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self._say(HTTPStatus.OK, "text/html; charset=utf-8", page(nonce), nonce=nonce)
        elif path == "/state.json":
            self._say(HTTPStatus.OK, "application/json", json.encode(self.state_of()))
        elif path == "/metrics":
            self._say(HTTPStatus.OK, CONTENT_TYPE, exposition(self.state_of()).encode())
        else:
            self._say(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"404: / and /metrics are here\n")

    do_HEAD = do_GET

    def version_string(self) -> str:
        """Say nothing of what answers."""
        return "fleetune"

    def log_message(self, format: str, *args: object) -> None:
        """Log no request: its line has the token in it."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that is none, in as few words."""
        self._say(HTTPStatus(code), "text/plain; charset=utf-8", f"{code}\n".encode())

    def _is_known(self) -> bool:
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = bearer.strip()
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.expected)

    def _say(self, status: HTTPStatus, kind: str, content: bytes, *, nonce: str = "") -> None:
        own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; " * bool(nonce)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": f"default-src 'none'; {own}base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cache-Control": "no-store",
        }
        if status == HTTPStatus.UNAUTHORIZED:
            headers["WWW-Authenticate"] = "Bearer"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
