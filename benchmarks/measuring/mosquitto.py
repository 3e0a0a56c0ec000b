"""A real Mosquitto for a measurement."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.errors import ConfigError

SYS_INTERVAL_S = 1
"""After which the server counts anew."""


@contextmanager
def mosquitto(folder: Path) -> Iterator[str]:
    """A real Mosquitto of our own configuration on a free port, ended when the block is left."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        raise ConfigError("no mosquitto on this machine: apt-get install mosquitto")
    port = 20000 + os.getpid() % 20000
    folder.mkdir(parents=True, exist_ok=True)
    configuration = write_configuration(
        folder / "mosquitto", port=port, user="root" if os.geteuid() == 0 else None
    )
    with configuration.open("a", encoding="utf-8") as file:
        file.write(f"\nsys_interval {SYS_INTERVAL_S}\n")
    process = subprocess.Popen([program, "-c", str(configuration)], stderr=subprocess.DEVNULL)
    try:
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
