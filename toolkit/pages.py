"""What the HTTP servers of pages have in common: answers with headers of ours alone, a thread, and a port that may be taken."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from fleetune.device_runtime.errors import ConfigError, one_line

_SILENT_S = 10.0
"""A connection on which no request comes is closed after so long."""
SHUT = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""Headers of every page: nobody else's embeds it, and it tells nobody where it was."""


class Answers(BaseHTTPRequestHandler):
    """A handler whose ``do_GET`` answers by :meth:`say`; what is asked for is logged nowhere."""

    timeout = _SILENT_S

    def version_string(self) -> str:
        """Say nothing of what answers."""
        return "fleetune"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: who asks for what is nobody's concern, and a token may be in it."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuse a request that is none, in as few words."""
        self.say(HTTPStatus(code), "text/plain; charset=utf-8", f"{code}\n".encode(), {"Connection": "close"})

    def do_HEAD(self) -> None:
        """As ``do_GET``, without the content."""
        self.do_GET()

    def do_GET(self) -> None:
        """Answer a request."""
        raise NotImplementedError

    def say(self, status: HTTPStatus, kind: str, content: bytes, headers: Mapping[str, str]) -> None:
        """Answer with a content of a MIME type, and these headers beside those of all pages."""
        length = {"Content-Type": kind, "Content-Length": str(len(content))}
        self.send_response(status)
        for name, value in (length | SHUT | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a tab that was closed while it loaded."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def listen(host: str, port: int, handler: type[Answers]) -> ThreadingHTTPServer:
    """Listen, port 0 for any that is free; ConfigError if it is taken, or the address is not ours."""
    try:
        server = _Server((host, port), handler)
    except (OSError, OverflowError) as exc:
        raise ConfigError(
            f"{host}:{port} cannot be listened at: {one_line(exc)}; give another --port, or --host"
        ) from exc
    server.daemon_threads = True
    return server


@contextmanager
def answering(server: ThreadingHTTPServer) -> Iterator[None]:
    """Answer in a thread while the block runs."""
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
