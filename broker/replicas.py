"""Adapters that devices have in place of a version, after a lossy codec: files named by version and SHA-256."""

import re
from hashlib import sha256
from pathlib import Path

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import StateError

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.safetensors")


class Replicas:
    """The replicas in one folder; what devices work from is durable before it is offered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        found = (_NAME.fullmatch(path.name) for path in folder.glob("*.safetensors"))
        self._kept = {(int(name[1]), name[2]) for name in found if name}

    def keep(self, version: int, content: bytes) -> None:
        """Keep an adapter file that stands for a version; StateError if it cannot be written."""
        replica = (version, sha256(content).hexdigest())
        if replica in self._kept:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(*replica), content)
        except OSError as exc:
            raise StateError(f"{self._folder}: cannot be written: {exc.strerror or exc}") from exc
        self._kept.add(replica)

    def stands_for(self, version: int, digest: str) -> bool:
        """Whether the adapter file with this SHA-256 stands for a version."""
        return (version, digest) in self._kept

    def content(self, digest: str) -> bytes | None:
        """The adapter file with this SHA-256; None if it is not kept, or damaged: then it is forgotten."""
        for replica in [r for r in self._kept if r[1] == digest]:
            path = self._path(*replica)
            content = path.read_bytes() if path.is_file() else b""
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
            self._path(*replica).unlink(missing_ok=True)

    def _path(self, version: int, digest: str) -> Path:
        return self._folder / f"{version:05d}-{digest}.safetensors"
