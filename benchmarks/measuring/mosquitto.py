"""A real Mosquitto for a measurement."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.errors import ConfigError

SYS_INTERVAL_S = 1
"""After which the server counts anew."""
_START_S = 10.0


class Server:
    """A Mosquitto of our own configuration on a port of its own, which may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        """Write the configuration below ``folder``; ConfigError without a Mosquitto on this machine."""
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            raise ConfigError("no mosquitto on this machine: apt-get install mosquitto")
        self._port = 20000 + os.getpid() % 12000  # from 32768 on the system gives them to whom connects
        folder.mkdir(parents=True, exist_ok=True)
        configuration = write_configuration(
            folder / "mosquitto", port=self._port, user="root" if os.geteuid() == 0 else None
        )
        with configuration.open("a", encoding="utf-8") as file:
            file.write(f"\nsys_interval {SYS_INTERVAL_S}\n")
        self._command = [program, "-c", str(configuration)]
        self._process: subprocess.Popen[bytes] | None = None
        self._spent_s = 0.0
        self.url = f"mqtt://127.0.0.1:{self._port}"

    @property
    def cpu_s(self) -> float:
        """Processor time of all its lives so far, seconds."""
        return self._spent_s + self._cpu_s()

    def start(self) -> None:
        """Start, and return once it listens; ConfigError if it does not."""
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                time.sleep(0.02)
            else:
                return
        raise ConfigError(f"Mosquitto does not listen on port {self._port} after {_START_S:g} s")

    def kill(self) -> None:
        """SIGKILL: nothing is written, nobody is told."""
        if self._process is not None:
            self._spent_s += self._cpu_s()
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it as a service manager would."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    def _cpu_s(self) -> float:
        if self._process is None:
            return 0.0
        # schedstat counts nanoseconds, stat hundredths of a second: a round of ten devices takes less
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def mosquitto_server(folder: Path) -> Iterator[Server]:
    """A server that runs, ended when the block is left."""
    server = Server(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def mosquitto(folder: Path) -> Iterator[str]:
    """As :func:`mosquitto_server`, for who needs its URL alone."""
    with mosquitto_server(folder) as server:
        yield server.url
