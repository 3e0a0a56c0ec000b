"""Real MQTT servers for tests: Mosquitto as a process that can be killed and started again on its port."""

import getpass
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import children
import pytest

BINARY = shutil.which("mosquitto", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def password_file(folder: Path, **logins: str) -> Path:
    """Write ``passwords``, as Mosquitto reads it."""
    path = folder / "passwords"
    path.write_text("")
    path.chmod(0o600)
    for login in logins.items():
        subprocess.run(["mosquitto_passwd", "-b", str(path), *login], check=True, capture_output=True)
    return path


def wait_for_port(port: int, process: subprocess.Popen | None = None, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise AssertionError(f"nothing listens on port {port}")


class Mosquitto:
    """A Mosquitto process; ``lines`` go into its configuration after the listener's."""

    def __init__(self, folder: Path, *lines: str, configuration: Path | None = None, port: int = 0) -> None:
        if BINARY is None:
            pytest.skip("mosquitto is not installed (apt-get install mosquitto)")
        self.port = port or free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._log = folder / "mosquitto.log"
        self.configuration = configuration or folder / "mosquitto.conf"
        if configuration is None:
            # Started by root it would become another user, who cannot read the tests' folders.
            text = [
                f"user {getpass.getuser()}",
                f"listener {self.port} 127.0.0.1",
                *(lines or ["allow_anonymous true"]),
            ]
            self.configuration.write_text("\n".join(text) + "\n")
        self._process: subprocess.Popen | None = None

    def start(self) -> "Mosquitto":
        with self._log.open("ab") as log:
            command = [BINARY, "-c", str(self.configuration)]
            self._process = children.start(command, stdout=log, stderr=log, cwd=self.configuration.parent)
        try:
            wait_for_port(self.port, self._process)
        except AssertionError as exc:
            raise AssertionError(f"{exc}: {self._log.read_text()}") from exc
        return self

    @property
    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        self._end("kill")

    def stop(self) -> None:
        self._end("terminate")

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> "Mosquitto":
        return self.start()

    def __exit__(self, *_) -> None:
        self._end("kill")

    def _end(self, how: str) -> None:
        if self._process is not None:
            getattr(self._process, how)()
            self._process.wait(10)
            self._process = None
