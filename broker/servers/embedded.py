"""An MQTT server inside this process, for trials and demonstrations: amqtt, which speaks MQTT 3.1.1, no login."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from amqtt.broker import Broker
from amqtt.errors import BrokerError

from fleetune.device_runtime.errors import ConfigError, TransportError

log = logging.getLogger(__name__)

_CONFIGURATION = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
_START_S = 20.0


class EmbeddedServer:
    """A server in a thread of its own; a context manager. It keeps nothing: a new one knows no retained message."""

    def __init__(self, port: int = 0, host: str = "127.0.0.1") -> None:
        """Choose a free port if ``port`` is 0; nothing listens until :meth:`start`."""
        _check_port(port)
        self.port = port or _free_port(host)
        self.host = host

    @property
    def url(self) -> str:
        """Return the address for a link; it names the version, so that nobody tries MQTT 5 first."""
        return f"mqtt://{self.host}:{self.port}?version=3.1.1"

    def start(self) -> None:
        """Start, and return when the port listens.

        Raises:
            TransportError: the port is busy, or the address is not this machine's.
        """
        listening: Future[None] = Future()
        self._loop = asyncio.new_event_loop()
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="mqtt-server", daemon=True)
        self._thread.start()
        listening.result(_START_S)

    def stop(self) -> None:
        """Hang up on everyone and free the port."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._ended.set)
            self._thread.join(_START_S)

    def __enter__(self) -> "EmbeddedServer":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self, listening: Future[None]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(
                _serve(self.host, self.port, ended=self._ended, listening=listening)
            )
        finally:
            _drain(self._loop)


def serve(
    *, port: int = 1883, host: str = "127.0.0.1", on_progress: Callable[[str], object] | None = None
) -> None:
    """Run a server until SIGINT or SIGTERM.

    Args:
        port: TCP port.
        host: address to listen on.
        on_progress: told the server's URL once it listens.

    Raises:
        ConfigError: no such port.
        TransportError: the port is busy, or the address is not this machine's.
    """
    _check_port(port)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        loop.run_until_complete(_serve(host, port, ended=ended, on_progress=on_progress))
    finally:
        _drain(loop)


def _check_port(port: int) -> None:
    if not 0 <= port < 2**16:
        raise ConfigError(f"port {port}: expected 0 to {2**16 - 1}")


async def _serve(
    host: str,
    port: int,
    *,
    ended: asyncio.Event,
    listening: Future[None] | None = None,
    on_progress: Callable[[str], object] | None = None,
) -> None:
    _quieten()
    try:
        broker = await _started(host, port)
    except TransportError as exc:
        if listening is None:
            raise
        listening.set_exception(exc)
        return
    if listening is not None:
        listening.set_result(None)
    (on_progress or log.info)(f"MQTT server listens on mqtt://{host}:{port}; Ctrl-C ends it")
    await ended.wait()
    await broker.shutdown()


async def _started(host: str, port: int) -> Broker:
    _check_free(host, port)
    listener = {"type": "tcp", "bind": f"{host}:{port}"}
    broker = Broker({"listeners": {"default": listener}, "plugins": _CONFIGURATION})
    try:
        await broker.start()
    except BrokerError as exc:
        raise TransportError(f"MQTT server on {host}:{port}: {exc}") from exc
    return broker


def _check_free(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except OSError as exc:
        raise TransportError(f"MQTT server on {host}:{port}: {exc.strerror}") from exc


def _free_port(host: str) -> int:
    try:
        with socket.create_server((host, 0)) as listener:
            return int(listener.getsockname()[1])
    except OSError as exc:
        raise TransportError(f"MQTT server on {host}: {exc.strerror}") from exc


def _quieten() -> None:
    """Amqtt logs every connection, and every client that speaks MQTT 5 as an unhandled exception."""
    for name in ("amqtt", "transitions"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    asyncio.get_running_loop().set_exception_handler(lambda _loop, told: log.debug("%s", told.get("message")))


def _drain(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.close()
