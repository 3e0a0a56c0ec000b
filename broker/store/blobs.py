"""The files of a ledger: adapters, strategy states and payloads, written whole, synced together, checked when read.

Payloads that come together lie one after the other in one file: to sync or delete a file costs as much as several of them.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import accumulate
from pathlib import Path

from fleetune.device_runtime.arrays import PRIVATE, replace_file, sync
from fleetune.device_runtime.errors import StateError

_VERSIONS = "versions"
_AT_ONCE = 4
"""Files and folders that are synced at once: a disk takes hardly longer for several."""
_AT = "@"
"""Between the name of a file and a part of it, START+SIZE in bytes."""


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
        self._unsynced: dict[Path, None] = {}
        """Files, and then their folders, that are written and may not be on disk yet."""
        self._syncing = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="sync")

    def sync(self) -> None:
        """Have on disk what was written; before any row that names it is. OSError if that cannot be."""
        paths, self._unsynced = [*self._unsynced], {}
        if paths:
            deque(self._syncing.map(sync, paths), maxlen=0)

    def write_version(self, version: int, content: bytes, state: bytes) -> None:
        """Write an adapter and the strategy's state after it, if there is one; OSError if they cannot be written."""
        self._write(version_path(self._folder, version), [content])
        self._kept.add(version)
        if state:
            self._write(self._state(version), [state], mode=PRIVATE)  # it may hold what devices sent
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
        """Write the payloads of updates by name into one file, at their :func:`places_of`; OSError if it cannot be written."""
        self._write(self._updates / _file_of(payloads), payloads.values(), mode=PRIVATE)

    def payload(self, place: str, digest: str) -> bytes:
        """Read the payload of an update; StateError if it is not what was written."""
        file, _, part = place.partition(_AT)
        start, _, size = part.partition("+")
        if part and not (start.isdecimal() and size.isdecimal()):
            raise StateError(f"{self._updates}: the ledger names {place!r}, which is no place: it is damaged")
        piece = slice(int(start), int(start) + int(size)) if part else slice(None)
        return read_checked(self._updates / file, digest, piece=piece)

    def sweep(self, *, newest: int) -> None:
        """Delete all payloads, and the states of versions before the newest: nobody asks for them again."""
        for path in self._updates.glob("*.bin"):
            path.unlink()
        for path in self._states - {self._state(newest)}:
            path.unlink(missing_ok=True)
            self._states.discard(path)

    def _write(self, path: Path, content: Iterable[bytes], *, mode: int = 0o666) -> None:
        """Write a file that no row names yet, to be synced with its folder."""
        replace_file(path, content, mode=mode, is_synced=False)
        self._unsynced.pop(path.parent, None)
        self._unsynced.update({path: None, path.parent: None})

    def _state(self, version: int) -> Path:
        return self._folder / _VERSIONS / f"{version:05d}.state.safetensors"


def places_of(payloads: Mapping[str, bytes]) -> dict[str, str]:
    """Where :meth:`Blobs.write_payloads` writes payloads: FILE, or FILE@START+SIZE where there are several."""
    file = _file_of(payloads)
    if len(payloads) == 1:
        return dict.fromkeys(payloads, file)
    starts = accumulate((len(payload) for payload in payloads.values()), initial=0)
    return {
        name: f"{file}{_AT}{start}+{len(payload)}"
        for (name, payload), start in zip(payloads.items(), starts, strict=False)
    }


def version_path(folder: Path, version: int) -> Path:
    """Where a job in ``folder`` has the adapter file of a version."""
    return folder / _VERSIONS / f"{version:05d}.safetensors"


def read_checked(path: Path, digest: str | None, *, piece: slice = slice(None)) -> bytes:
    """Read a file that the ledger names, or a piece of it; StateError if it is not there, or its SHA-256 is another."""
    try:
        content = path.read_bytes() if piece == slice(None) else _read_piece(path, piece)
    except OSError as exc:
        raise StateError(f"{path}: named in the ledger, but cannot be read: {exc}") from exc
    found = sha256(content).hexdigest()
    if found != digest:
        raise StateError(
            f"{path}: SHA-256 {found[:12]}, the ledger says {str(digest)[:12]}: damaged, or replaced"
        )
    return content


def _file_of(payloads: Mapping[str, bytes]) -> str:
    return f"{next(iter(payloads))}.bin"


def _read_piece(path: Path, piece: slice) -> bytes:
    with path.open("rb") as file:
        file.seek(piece.start)
        return file.read(piece.stop - piece.start)
