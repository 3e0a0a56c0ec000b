"""A job whose aggregator or device loses its disk, in a mount namespace of its own: full, or read-only, and whole again later.

As a program: ``python bad_disk.py FOLDER WHO HOW TURN`` runs one job on a small file system mounted at FOLDER, which is spoilt
before turn TURN, and prints what it came to as JSON. WHO is ``aggregator`` or ``device``, HOW is ``full`` or ``read-only``.
"""

import json
import logging
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import fleet
from paths import ROOT

from fleetune.device_runtime.errors import FleetuneError

SIZE, ROUNDS, STAYS_BAD = 2000, 4, 30
_UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--")
_ON_TMPFS = 'mount -t tmpfs -o size=2m none "$1" && exec "$0" "$2" "$@"'


def can_mount() -> bool:
    """Whether this user may mount in a namespace of their own."""
    if not shutil.which("unshare"):
        return False
    return (
        subprocess.run(
            [*_UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
        ).returncode
        == 0
    )


def run(folder: Path, who: str, how: str, turn: int) -> dict:
    """What a job came to whose disk was spoilt before ``turn``; its other half lies in FOLDER.other."""
    paths = f"{ROOT}:{ROOT / 'tests' / 'support'}"
    command = [*_UNSHARE, "env", f"PYTHONPATH={paths}", "sh", "-c", _ON_TMPFS, sys.executable]
    arguments = [folder, __file__, who, how, turn]
    done = subprocess.run([*map(str, [*command, *arguments])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Disk:
    """A small file system that can be filled or made read-only, and be whole again."""

    def __init__(self, folder: Path, how: str) -> None:
        self._folder, self._how, self._ballast = folder, how, folder / "ballast"

    def spoil(self) -> None:
        """Leave no byte free, or make it read-only."""
        if self._how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", self._folder], check=True)
            return
        with self._ballast.open("ab", buffering=0) as file:
            for size in (65536, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    pass  # full

    def mend(self) -> None:
        """Make it whole."""
        if self._how == "read-only":
            subprocess.run(["mount", "-o", "remount,rw", self._folder], check=True)
        else:
            self._ballast.unlink(missing_ok=True)


def job(aggregator_at: Path, devices_at: Path) -> fleet.World:
    server = fleet.Loopback()
    aggregator = fleet.Aggregator(
        server, aggregator_at, clients=2, min_clients=2, rounds=ROUNDS, size=SIZE, codec="int8"
    ).start()
    devices = [fleet.Device(server, devices_at, n, size=SIZE).start() for n in (0, 1)]
    return fleet.World(server, aggregator, devices)


def versions(world: fleet.World) -> list[str]:
    """The digest of every version."""
    return [sha256(world.aggregator.version(n)).hexdigest() for n in range(ROUNDS + 1)]


def main() -> None:
    """Run one job; see the module."""
    logging.disable(logging.CRITICAL)
    _, folder, _, who, how, turn = sys.argv
    small, other = Path(folder), Path(folder + ".other")
    world = job(small, other) if who == "aggregator" else job(other, small)
    disk = Disk(small, how)
    for _ in range(int(turn)):
        world.turn()
    said = (_stopped if how == "full" else _not_started)(world, who, disk)
    disk.mend()
    for member in _members(world, who):
        if said:
            member.start(*([world.now] if who == "aggregator" else []))
    world.run()
    sys.stdout.write(json.dumps({"said": said, "versions": versions(world)}))


def _members(world: fleet.World, who: str) -> list:
    return [world.aggregator] if who == "aggregator" else world.devices


def _stopped(world: fleet.World, who: str, disk: Disk) -> list[str]:
    """What stops at work as its disk is full."""
    disk.spoil()
    for _ in range(STAYS_BAD):
        try:
            world.turn()
        except (FleetuneError, OSError) as exc:
            for member in _members(world, who):
                member.kill()
            return [_shown(exc)]
    return []


def _not_started(world: fleet.World, who: str, disk: Disk) -> list[str]:
    """What is started on a disk that has become read-only; Linux makes none so under an open file."""
    for member in _members(world, who):
        member.kill()
    disk.spoil()
    said = []
    for member in _members(world, who):
        try:
            member.start(*([world.now] if who == "aggregator" else []))
        except (FleetuneError, OSError) as exc:
            said.append(_shown(exc))
    return said


def _shown(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


if __name__ == "__main__":
    main()
