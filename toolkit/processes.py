"""Device processes on this machine: started, watched and always reaped."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetune.device_runtime.errors import FleetuneError

_GRACE_S = 5.0
START = (
    "import sys; sys.path[:1] = [p for p in sys.path[:1] if p]; from fleetune.toolkit.cli import main; main()"
)
"""The command line, for ``python -c``, which puts the current folder first: the user's, not a place of libraries.

``PYTHONSAFEPATH`` would do, but not in Python 3.10.
"""


class DeviceDied(FleetuneError):
    """A device process of the demo ended before the job was over."""


@dataclass
class Member:
    """One device process; its output is in ``folder``."""

    name: str
    folder: Path
    process: subprocess.Popen[bytes]

    def report(self) -> dict[str, Any]:
        """The object on the last line of its output: a ``DeviceReport``, once it has ended well."""
        report: dict[str, Any] = json.loads((self.folder / "output.txt").read_text().splitlines()[-1])
        return report


@dataclass
class Fleet:
    """All device processes of a demo."""

    members: list[Member] = field(default_factory=list)

    def start(self, name: str, folder: Path, arguments: Sequence[str]) -> None:
        """Start ``fleetune device`` with ``arguments``; it writes output.txt and log.txt in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", START, "device", *arguments]
        with (folder / "output.txt").open("wb") as output, (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=log)
        self.members.append(Member(name, folder, process))

    def watch(self) -> None:
        """See that nobody has died.

        Raises:
            DeviceDied: a process ended with an error; its last words are in the message.
        """
        for member in self.members:
            if code := member.process.poll():
                raise DeviceDied(f"device {member.name} ended with {code}: {_last_words(member.folder)}")

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended by themselves.

        Raises:
            DeviceDied: one has not within ``timeout_s``, or it ended with an error.
        """
        deadline = time.monotonic() + timeout_s
        for member in self.members:
            try:
                member.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired as exc:
                raise DeviceDied(
                    f"device {member.name} did not end within {timeout_s:.0f} s of the last round"
                ) from exc
        self.watch()

    def close(self) -> None:
        """End who still runs: first by asking, then by force."""
        running = [m.process for m in self.members if m.process.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def fleet() -> Iterator[Fleet]:
    """A fleet whose processes are gone when the block is left, however it is left."""
    members = Fleet()
    try:
        yield members
    finally:
        members.close()


def _last_words(folder: Path) -> str:
    with (folder / "log.txt").open("rb") as log:
        log.seek(max(0, os.fstat(log.fileno()).st_size - 2000))
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"
