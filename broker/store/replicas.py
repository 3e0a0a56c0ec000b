"""Adapters that devices have in place of a version, after a lossy codec: files named by version and SHA-256."""

import re
from hashlib import sha256
from pathlib import Path

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import StateError

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.safetensors")


class Replicas:
    """The replicas of one job; what devices work from is durable before it is offered."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find those of an earlier life; without a folder they are kept in memory."""
        self._folder = folder
        self._contents: dict[tuple[int, str], bytes] = {}
        names = [path.name for path in folder.glob("*.safetensors")] if folder else []
        self._kept = {(int(name[1]), name[2]) for name in map(_NAME.fullmatch, names) if name}

    def keep(self, version: int, content: bytes) -> None:
        """Keep an adapter file that stands for a version; StateError if it cannot be written."""
        replica = (version, sha256(content).hexdigest())
        if replica in self._kept:
            return
        self._write(replica, content)
        self._kept.add(replica)

    def stands_for(self, version: int, digest: str) -> bool:
        """Whether the adapter file with this SHA-256 stands for a version."""
        return (version, digest) in self._kept

    def content(self, digest: str) -> bytes | None:
        """The adapter file with this SHA-256; None if it is not kept, or damaged: then it is forgotten."""
        for replica in [r for r in self._kept if r[1] == digest]:
            content = self._read(replica)
            if sha256(content).hexdigest() == digest:
                return content
            self._kept.discard(replica)
        return None

    def knows(self, digest: str) -> bool:
        """Whether the adapter file with this SHA-256 stands for any version."""
        return any(kept == digest for _, kept in self._kept)

    def count(self, version: int) -> int:
        """How many stand for a version."""
        return sum(v == version for v, _ in self._kept)

    def forget_before(self, version: int) -> None:
        """Delete those that stand for versions before this one."""
        for replica in [r for r in self._kept if r[0] < version]:
            self._kept.discard(replica)
            self._delete(replica)

    def _write(self, replica: tuple[int, str], content: bytes) -> None:
        if self._folder is None:
            self._contents[replica] = content
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._folder / _file(*replica), content)
        except OSError as exc:
            raise StateError(f"{self._folder}: cannot be written: {exc.strerror or exc}") from exc

    def _read(self, replica: tuple[int, str]) -> bytes:
        if self._folder is None:
            return self._contents[replica]
        path = self._folder / _file(*replica)
        return path.read_bytes() if path.is_file() else b""

    def _delete(self, replica: tuple[int, str]) -> None:
        self._contents.pop(replica, None)
        if self._folder:
            (self._folder / _file(*replica)).unlink(missing_ok=True)


def _file(version: int, digest: str) -> str:
    return f"{version:05d}-{digest}.safetensors"
