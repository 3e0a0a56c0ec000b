"""Serves the page, the state and the metrics to who has the token; nobody else learns more than that something listens."""

import hmac
import logging
import secrets
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from msgspec import json

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.pages import Answers, listen
from fleetune.toolkit.watching.metrics import CONTENT_TYPE, exposition
from fleetune.toolkit.watching.page import page
from fleetune.toolkit.watching.state import FleetState

log = logging.getLogger(__name__)

TOKEN_CHARS_MIN = 16
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
    """Listen, port 0 for any free one; ConfigError if the address is taken or not ours."""

    class Handler(_Handler):
        expected, state_of = token.encode(), staticmethod(state)

    return listen(host, port, Handler)


class _Handler(Answers):
    expected: bytes
    state_of: Callable[[], FleetState]

    def do_GET(self) -> None:
        """Answer a request, or say 401 whatever is asked for."""
        if not self._is_known():
            self.say(
                HTTPStatus.UNAUTHORIZED,
                "text/plain; charset=utf-8",
                _NO_TOKEN,
                {"WWW-Authenticate": "Bearer"},
            )
            return
        path = urlsplit(self.path).path
        if path == "/":
            nonce = secrets.token_urlsafe(16)
            self.say(HTTPStatus.OK, "text/html; charset=utf-8", page(nonce), _policy(nonce))
        elif path == "/state.json":
            self.say(HTTPStatus.OK, "application/json", json.encode(self.state_of()), {})
        elif path == "/metrics":
            self.say(HTTPStatus.OK, CONTENT_TYPE, exposition(self.state_of()).encode(), {})
        else:
            self.say(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"404: / and /metrics are here\n", {})

    def _is_known(self) -> bool:
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            given = bearer.strip()
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.expected)

    def say(self, status: HTTPStatus, kind: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Answer; what is no page runs nothing, and nobody keeps any of it."""
        super().say(status, kind, content, _policy("") | {"Cache-Control": "no-store"} | dict(headers))


def _policy(nonce: str) -> dict[str, str]:
    own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; " * bool(nonce)
    rest = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {"Content-Security-Policy": f"default-src 'none'; {own}{rest}"}
