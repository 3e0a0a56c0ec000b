"""Bad links for tests: real TCP over packets that are lost, late, doubled or few, and connections that are cut.

Packets go through this process, between two TUN devices, one of them in a network namespace of its own: no ``tc netem``, which
many kernels lack, but root and ``/dev/net/tun``.
"""

import asyncio
import contextlib
import fcntl
import heapq
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time

import pytest

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_HELD_BYTES = 4096
"""What a proxy holds of what it carries."""
_QUEUE_S = 4.0
"""What would wait for longer before a narrow link is dropped, as routers do."""


class BadLink:
    """A network namespace behind a link; a context manager. Commands that begin with ``prefix`` run behind it."""

    def __init__(
        self,
        *,
        loss: float = 0.0,
        delay_s: float = 0.0,
        double: float = 0.0,
        bytes_s: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Each way shares of the packets are lost and doubled, all are ``delay_s`` late, and ``bytes_s`` go through (0: all)."""
        if os.getuid() or not os.path.exists("/dev/net/tun") or not shutil.which("ip"):
            pytest.skip("a bad link needs root, ip and /dev/net/tun")
        self.loss, self.delay_s, self.double, self.bytes_s = loss, delay_s, double, bytes_s
        self.packets = self.lost = self.bytes = 0
        self.cut_until = 0.0
        """Until then nothing goes through."""
        number = os.getpid() % 60000
        self.name, net = f"ft{number}", f"10.{200 + number // 250 % 50}.{number % 250}"
        self.host = f"{net}.1"
        self.prefix = ["ip", "netns", "exec", self.name]
        self._net, self._rng, self._stop = net, random.Random(seed), threading.Event()
        self._free_at = [0.0, 0.0]

    def __enter__(self) -> "BadLink":
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)
        _ip("netns", "add", self.name)
        near, far = f"{self.name}a", f"{self.name}b"
        self._fds = [_tun(near), _tun(far)]
        _ip("link", "set", far, "netns", self.name)
        _ip("addr", "add", f"{self._net}.1/30", "dev", near)
        _ip("link", "set", near, "up")
        for words in (
            ("addr", "add", f"{self._net}.2/30", "dev", far),
            ("link", "set", far, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("netns", "exec", self.name, "ip", *words)
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(5)
        for fd in self._fds:
            os.close(fd)
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)

    def _carry(self) -> None:
        late: list[tuple[float, int, int, bytes]] = []
        while not self._stop.is_set():
            now = time.monotonic()
            wait_s = min(0.2, max(0.0, late[0][0] - now)) if late else 0.2
            for fd in select.select(self._fds, [], [], wait_s)[0]:
                self._take(os.read(fd, 2048), self._fds.index(fd), late)
            while late and late[0][0] <= time.monotonic():
                _, _, way, packet = heapq.heappop(late)
                with contextlib.suppress(OSError):  # the interface is not up yet
                    os.write(self._fds[1 - way], packet)

    def _take(self, packet: bytes, way: int, late: list[tuple[float, int, int, bytes]]) -> None:
        now = time.monotonic()
        self.packets += 1
        if now < self.cut_until or self._rng.random() < self.loss:
            self.lost += 1
            return
        due = now
        if self.bytes_s:
            due = max(now, self._free_at[way]) + len(packet) / self.bytes_s
            if due - now > _QUEUE_S:
                self.lost += 1
                return
            self._free_at[way] = due
        self.bytes += len(packet)
        for _ in range(1 + (self._rng.random() < self.double)):
            heapq.heappush(late, (due + self.delay_s, self.packets, way, packet))


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Cuts:
    """A TCP proxy that resets each connection after so many bytes, drawn between two; a context manager.

    ``bytes_s`` go through it a second each way of each connection; 0: as many as come.
    """

    def __init__(self, port: int, *, after: tuple[int, int], seed: int = 0, bytes_s: float = 0.0) -> None:
        self._port, self._after, self._rng, self._bytes_s = port, after, random.Random(seed), bytes_s
        self.resets = self.bytes = self.connections = 0
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> "Cuts":
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, _HELD_BYTES
        )  # a narrow link has no room of its own
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, sock=listener, limit=_HELD_BYTES)
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        left = [self._rng.randint(*self._after)]
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port, limit=_HELD_BYTES)
        except OSError:
            writer.transport.abort()
            return
        ways = [self._pump(reader, far_writer, left), self._pump(far_reader, writer, left)]
        tasks = [asyncio.ensure_future(way) for way in ways]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.resets += left[0] <= 0
        for task in tasks:
            task.cancel()
        for one in (writer, far_writer):
            with contextlib.suppress(OSError):  # it is closed
                sock = one.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            one.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, left: list[int]
    ) -> None:
        try:
            while left[0] > 0 and (piece := await reader.read(min(left[0], _HELD_BYTES))):
                left[0] -= len(piece)
                self.bytes += len(piece)
                writer.write(piece)
                await writer.drain()
                if self._bytes_s:
                    await asyncio.sleep(len(piece) / self._bytes_s)
        except OSError:
            return
