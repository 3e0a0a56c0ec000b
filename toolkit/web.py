"""``fleetune web``: serves an artifact with a page that trains it in the visitor's browser; nothing comes from elsewhere."""

import gzip
import mimetypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from http import HTTPStatus
from pathlib import Path
from threading import Event
from urllib.parse import unquote, urlsplit

import msgspec

from fleetune.device_runtime.commands.sign import SIGNATURE, check_signed
from fleetune.device_runtime.contracts.artifact import MANIFEST, Artifact, open_artifact
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.errors import ConfigError, one_line
from fleetune.device_runtime.network.signing import (
    NO_AUTHORITY,
    Trusted,
    public_pem,
    read_authorities,
    read_public,
)
from fleetune.toolkit.pages import Answers, answering, listen

PAGE = Path(__file__).parent / "page"
"""Made by ``make web``; a wheel brings it."""
PORT = 8765
_TYPES = {
    ".mjs": "text/javascript",
    ".js": "text/javascript",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
_PACKED = (".js", ".mjs", ".wasm", ".css", ".html")
"""What travels compressed to who takes that."""
_SETTINGS = "settings.json"


class WebReport(msgspec.Struct, frozen=True, kw_only=True):
    """Where the page was."""

    url: str
    requests: int


class _Site:
    """What may be asked for, by path; nothing else of the disk can be."""

    def __init__(self, page: Path, artifact: Path, names: list[str], settings: bytes, mqtt: str) -> None:
        self.settings, self.mqtt, self.requests = settings, mqtt, 0
        self.files = {f"/{path.name}": path for path in sorted(page.iterdir()) if path.is_file()}
        self.files["/"] = self.files["/index.html"]
        self.files |= {f"/artifact/{name}": artifact / name for name in names}

    @property
    def headers(self) -> dict[str, str]:
        """Isolation, for threads; and a policy by which the page reaches this server and the MQTT server alone."""
        return {
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Content-Security-Policy": (
                "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; style-src 'self'; img-src 'self'; "
                f"connect-src 'self' {self.mqtt}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
            "Cache-Control": "no-cache",
        }


def web(
    artifact_dir: Path | str,
    *,
    mqtt: str = "",
    job: str = "",
    trust: Path | str = "",
    mask_authority: Path | str = "",
    host: str = "127.0.0.1",
    port: int = PORT,
    on_note: Callable[[str], object] | None = None,
) -> WebReport:
    """Serve the page until it is interrupted.

    Args:
        artifact_dir: folder made by ``fleetune export``; every file is checked before one is served.
        mqtt: WebSocket address of the MQTT server, ``ws://host[:port]`` or ``wss://…``, for who joins a job; empty: none can.
        job: name of the job that the page suggests.
        trust: file of the public keys (Ed25519, PEM) that the page pins; one of them has to have signed the artifact.
        mask_authority: file of the authorities (PEM) of which one must have signed the certificate of each device that the page
            masks with; ``none`` or empty: it masks with any.
        host: address that is listened at; all but this machine's own ones are reached by others.
        port: 0 for any that is free.
        on_note: told where the page is.

    Raises:
        ArtifactError: the artifact is damaged, or signed by none of the keys.
        ConfigError: no page is built, an address that no page can speak to, no such keys, or a port that is taken.
    """
    with serving(
        artifact_dir, mqtt=mqtt, job=job, trust=trust, mask_authority=mask_authority, host=host, port=port
    ) as (url, requests):
        if on_note:
            on_note(f"the page is at {url}; Ctrl-C ends it")
        with suppress(KeyboardInterrupt):
            Event().wait()
        return WebReport(url=url, requests=requests())


@contextmanager
def serving(
    artifact_dir: Path | str,
    *,
    mqtt: str = "",
    job: str = "",
    trust: Path | str = "",
    mask_authority: Path | str = "",
    host: str = "127.0.0.1",
    port: int = 0,
    page: Path = PAGE,
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Serve in a thread; gives the address, and what counts the requests. Arguments and errors as of :func:`web`."""
    site = _site(Path(artifact_dir), page, mqtt=mqtt, job=job, trust=trust, mask_authority=mask_authority)
    server = listen(host, port, _handler(site))
    with answering(server):
        yield f"http://{host}:{server.server_address[1]}/", lambda: site.requests


def _site(
    artifact_dir: Path, page: Path, *, mqtt: str, job: str, trust: Path | str, mask_authority: Path | str
) -> _Site:
    if not (page / "index.html").is_file():
        raise ConfigError(
            f"no page is built in {page}: run `make web`, which takes node, or install a wheel that has it"
        )
    artifact = open_artifact(artifact_dir)
    if artifact.manifest.backend != "onnx":
        raise ConfigError(
            f"{artifact_dir}: a page runs artifacts of backend 'onnx', not {artifact.manifest.backend!r}"
        )
    if job:
        check_name("job", job)
    pinned = _pinned(artifact, trust) if trust else ""
    is_named = str(mask_authority) not in ("", NO_AUTHORITY)
    authority = read_authorities(mask_authority).pem if is_named else ""
    told = {"mqtt": _checked(mqtt), "job": job, "trust": pinned, "mask_authority": authority}
    settings = msgspec.json.encode(told)
    return _Site(page, artifact.folder, [MANIFEST, SIGNATURE, *artifact.manifest.files], settings, mqtt)


def _pinned(artifact: Artifact, trust: Path | str) -> str:
    """The public keys of a file, in PEM, of which one has signed the artifact."""
    keys = read_public(trust)
    check_signed(artifact, Trusted(keys))
    return "".join(public_pem(key).decode() for key in keys)


def _checked(mqtt: str) -> str:
    """The address of an MQTT server that a page can speak to, and that goes into its policy."""
    if not mqtt:
        return ""
    try:
        parts = urlsplit(mqtt)
        port = parts.port
    except ValueError as exc:
        raise ConfigError(f"mqtt {one_line(mqtt)!r}: {exc}") from exc
    if parts.scheme not in ("ws", "wss") or not parts.hostname or set(mqtt) & set(" ;,'\""):
        raise ConfigError(
            f"mqtt {one_line(mqtt)!r}: a page speaks MQTT over WebSockets alone; give ws://host:port or wss://host:port"
        )
    if parts.username or parts.password:
        raise ConfigError(
            "mqtt: leave the login out of the address: whoever opens the page would have it; the page asks for one"
        )
    if port == 0:
        raise ConfigError(f"mqtt {mqtt!r}: port 0")
    return mqtt


def _handler(site: _Site) -> type[Answers]:
    class Handler(Answers):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.requests += 1
            path = unquote(urlsplit(self.path).path)
            if path == f"/{_SETTINGS}":
                self._send(HTTPStatus.OK, site.settings, "application/json")
            elif (file := site.files.get(path)) and file.is_file():
                self._send_file(file, packs=not path.startswith("/artifact/"))
            else:
                self._send(HTTPStatus.NOT_FOUND, b"there is nothing here\n", "text/plain")

        def _send_file(self, file: Path, *, packs: bool) -> None:
            kind = _TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            takes_gzip = "gzip" in self.headers.get("Accept-Encoding", "")
            if packs and takes_gzip and file.suffix in _PACKED:
                self._send(HTTPStatus.OK, _packed(file), kind, packed=True)
            else:
                self._send(HTTPStatus.OK, file.read_bytes(), kind)

        def _send(self, status: HTTPStatus, content: bytes, kind: str, *, packed: bool = False) -> None:
            self.say(status, kind, content, site.headers | ({"Content-Encoding": "gzip"} if packed else {}))

    return Handler


@lru_cache(maxsize=16)
def _packed(file: Path) -> bytes:
    return gzip.compress(file.read_bytes(), 6, mtime=0)
