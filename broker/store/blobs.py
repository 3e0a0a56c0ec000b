"""The files of a ledger: adapters, strategy states and payloads, written whole and synced, checked when read."""

from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path

from fleetune.device_runtime.arrays import PRIVATE, sync_folder, write_atomically
from fleetune.device_runtime.errors import StateError

_VERSIONS = "versions"
_AT_ONCE = 8
"""Payloads that are written and synced at once."""


class Blobs:
    """Files below one folder, by the names that the ledger's rows give them."""

    def __init__(self, folder: Path) -> None:
        """Make the folders; OSError if that cannot be."""
        self._folder, self._updates = folder, folder / "updates"
        for part, mode in (
            (folder / _VERSIONS, 0o777),
            (self._updates, 0o700),
        ):  # what devices send is nobody else's
            part.mkdir(mode=mode, parents=True, exist_ok=True)
            for left in part.glob(".*.part"):
                left.unlink()  # by a process that was killed while it wrote
        names = (path.name.removesuffix(".safetensors") for path in (folder / _VERSIONS).iterdir())
        self._kept = {int(name) for name in names if name.isdecimal()}
        self._states = set((folder / _VERSIONS).glob("*.state.safetensors"))

    def write_version(self, version: int, content: bytes, state: bytes) -> None:
        """Write an adapter and the strategy's state after it, if there is one; OSError if they cannot be written."""
        write_atomically(version_path(self._folder, version), content)
        self._kept.add(version)
        if state:
            write_atomically(self._state(version), state, mode=PRIVATE)  # it may hold what devices sent
            self._states.add(self._state(version))

    def has_version(self, version: int) -> bool:
        """Whether the file of a version is kept."""
        return version in self._kept

    def kept_before(self, version: int) -> list[int]:
        """Return the versions before this one whose files are kept, but for version 0."""
        return [kept for kept in self._kept if 0 < kept < version]

    def forget(self, version: int) -> None:
        """Delete the adapter of a version; OSError if that cannot be."""
        version_path(self._folder, version).unlink(missing_ok=True)
        self._kept.discard(version)

    def version(self, version: int, digest: str | None) -> bytes:
        """Read an adapter; StateError if it is not what was written."""
        return read_checked(version_path(self._folder, version), digest)

    def state(self, version: int, digest: str) -> bytes:
        """Read the strategy's state after a version; StateError if it is not what was written."""
        return read_checked(self._state(version), digest)

    def write_payloads(self, payloads: Mapping[str, bytes]) -> None:
        """Write the payloads of updates by name, several at once: a disk syncs eight in the time of two or three.

        Raises:
            OSError: one cannot be written.
        """
        paths = [self._updates / name for name in payloads]
        write = partial(write_atomically, mode=PRIVATE, is_named=False)
        if len(paths) == 1:
            write(paths[0], *payloads.values())
        else:
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                deque(threads.map(write, paths, payloads.values()), maxlen=0)
        sync_folder(self._updates)

    def payload(self, name: str, digest: str) -> bytes:
        """Read the payload of an update; StateError if it is not what was written."""
        return read_checked(self._updates / name, digest)

    def sweep(self, *, newest: int) -> None:
        """Delete all payloads, and the states of versions before the newest: nobody asks for them again."""
        for path in self._updates.glob("*.bin"):
            path.unlink()
        for path in self._states - {self._state(newest)}:
            path.unlink(missing_ok=True)
            self._states.discard(path)

    def _state(self, version: int) -> Path:
        return self._folder / _VERSIONS / f"{version:05d}.state.safetensors"


def version_path(folder: Path, version: int) -> Path:
    """Where a job in ``folder`` has the adapter file of a version."""
    return folder / _VERSIONS / f"{version:05d}.safetensors"


def read_checked(path: Path, digest: str | None) -> bytes:
    """Read a file that the ledger names; StateError if it is not there, or its SHA-256 is another."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise StateError(f"{path}: named in the ledger, but cannot be read: {exc}") from exc
    found = sha256(content).hexdigest()
    if found != digest:
        raise StateError(
            f"{path}: SHA-256 {found[:12]}, the ledger says {str(digest)[:12]}: damaged, or replaced"
        )
    return content
