"""Small named files that survive: in a folder, or in memory for a simulation; and what a file that fails raises."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

import msgspec

from fleetune.device_runtime.arrays import PRIVATE, write_atomically
from fleetune.device_runtime.errors import ArtifactError, StateError
from fleetune.device_runtime.prepared import prepared

T = TypeVar("T")
PathUser = Callable[[Path], object]
"""Writes, or reads, the file at a path."""


def give_usual_modes(folder: Path) -> None:
    """Give a folder's files the mode that new files get here; libraries make some that only their owner may read."""
    umask = os.umask(0o077)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def private_file(path: Path) -> None:
    """Make a file that its owner alone can read, if it is not there; narrow the mode of one that is theirs."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        if os.fstat(handle).st_uid == os.geteuid():
            os.fchmod(handle, PRIVATE)
    finally:
        os.close(handle)


@contextmanager
def doing(what: str, where: Path) -> Iterator[None]:
    """Raise an OSError as a StateError that says that ``where`` cannot be ``what`` ("written")."""
    try:
        yield
    except OSError as exc:
        raise StateError(f"{where}: cannot be {what}: {exc.strerror or exc}") from exc


@contextmanager
def alone_in(folder: Path, told: str, *, lock: str = "lock") -> Iterator[None]:
    """Hold a folder for this process by the file ``lock`` in it, which goes with whatever ends the process.

    Raises:
        StateError: another process has it, ``told`` in a line; or the file cannot be written.
    """
    with doing("written", folder):
        try:
            held = locked(folder / lock)
        except BlockingIOError as exc:
            raise StateError(f"{folder}: {told}") from exc
    with held:
        yield


def locked(path: Path, *, wait: bool = False, mode: int = 0o666) -> TextIO:
    """Open a file for this process alone, made if it is not there; closing it, or whatever ends the process, gives it back.

    Raises:
        BlockingIOError: another process has it, and this one is not to ``wait``.
        OSError: it cannot be opened.
    """
    file = open(path, "a", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115 (the caller's)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        file.close()
        raise
    return file


def read_json(path: Path, kind: type[T]) -> T | None:
    """Read a JSON file as ``kind``; None if there is none.

    Raises:
        ArtifactError: it cannot be read, or is of another form.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=prepared(kind))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise ArtifactError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Make a folder beside ``out`` that takes its place when all went well, and is gone otherwise.

    Raises:
        OSError: it cannot be written.
    """
    target = out.resolve()
    part = target.with_name(f".{target.name}.part")
    new = [parent for parent in part.parents if not parent.exists()]
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in new:
            with suppress(OSError):  # not empty: the new folder is in it
                parent.rmdir()


class Files(Protocol):
    """Files by name; every method that writes raises StateError if it cannot, and then the old file is whole."""

    def names(self) -> list[str]:
        """Names of the files here, sorted."""

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, whole."""

    def secret(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Content of a file that its owner alone may read; made and kept by the first call."""

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of a file, which is made if it is not there; a loss of power may leave a part of it."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def save(self, name: str, save: PathUser) -> None:
        """Let ``save``, which replaces files whole, write a file."""

    def load(self, name: str, load: PathUser) -> bool:
        """Let ``load`` read a file; False if there is none. What ``load`` raises passes."""


class DiskFiles:
    """Files in a folder, for their owner alone: what a device keeps, and what is kept of devices, may give data away."""

    def __init__(self, folder: Path) -> None:
        """Make the folder; StateError if it cannot be made."""
        self._folder = folder
        with self._writing():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in folder.glob(".*.part"):
                left.unlink()  # by a process that was killed while it wrote

    def names(self) -> list[str]:
        """Names of the files here, sorted."""
        with self._doing("read"):
            return sorted(path.name for path in self._folder.iterdir() if path.is_file())

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if there is none; StateError if it cannot be read."""
        path = self._folder / name
        with self._doing("read"):
            return path.read_bytes() if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        """Replace a file, whole and synced."""
        with self._writing():
            write_atomically(self._folder / name, content, mode=PRIVATE)

    def secret(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Content of a file that its owner alone may read; made and kept, synced, by the first call."""
        if (found := self.read(name)) is not None:
            return found
        with self._writing():
            write_atomically(self._folder / name, content := make(), mode=0o600)
        return content

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of a file, synced."""
        with self._writing():
            private_file(self._folder / name)
            with (self._folder / name).open("ab") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with self._writing():
            (self._folder / name).unlink(missing_ok=True)

    def save(self, name: str, save: PathUser) -> None:
        """Let ``save``, which replaces files whole, write a file."""
        with self._writing():
            save(self._folder / name)

    def load(self, name: str, load: PathUser) -> bool:
        """Let ``load`` read a file; False if there is none."""
        path = self._folder / name
        if not path.is_file():
            return False
        load(path)
        return True

    def _writing(self) -> AbstractContextManager[None]:
        return self._doing("written")

    def _doing(self, what: str) -> AbstractContextManager[None]:
        return doing(what, self._folder)


class MemoryFiles:
    """Files in memory: gone with the object, and no file descriptor."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}

    def names(self) -> list[str]:
        """Names of the files here, sorted."""
        return sorted(self._files)

    def read(self, name: str) -> bytes | None:
        """Content of a file, or None if there is none."""
        return self._files.get(name)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file."""
        self._files[name] = content

    def secret(self, name: str, make: Callable[[], bytes]) -> bytes:
        """Content of a file; made and kept by the first call."""
        return self._files.setdefault(name, self._files.get(name) or make())

    def append(self, name: str, content: bytes) -> None:
        """Add to the end of a file."""
        self._files[name] = self._files.get(name, b"") + content

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        self._files.pop(name, None)

    def save(self, name: str, save: PathUser) -> None:
        """Let ``save`` write a file, in a folder that is gone afterwards."""
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder) / name)
            self._files[name] = (Path(folder) / name).read_bytes()

    def load(self, name: str, load: PathUser) -> bool:
        """Let ``load`` read a file, in a folder that is gone afterwards; False if there is none."""
        content = self._files.get(name)
        if content is None:
            return False
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / name).write_bytes(content)
            load(Path(folder) / name)
        return True
