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
        self._versions = {name[2]: int(name[1]) for name in found if name}

    def keep(self, version: int, content: bytes) -> str:
        """Keep an adapter file and return its SHA-256; StateError if it cannot be written."""
        digest = sha256(content).hexdigest()
        if digest in self._versions:
            return digest
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path(version, digest), content)
        except OSError as exc:
            raise StateError(f"{self._folder}: cannot be written: {exc.strerror or exc}") from exc
        self._versions[digest] = version
        return digest

    def version(self, digest: str) -> int:
        """Version that the adapter file with this SHA-256 stands for; -1 if it is not kept."""
        return self._versions.get(digest, -1)

    def content(self, digest: str) -> bytes | None:
        """The adapter file with this SHA-256; None if it is not kept, or damaged: then it is forgotten."""
        if digest not in self._versions:
            return None
        path = self._path(self._versions[digest], digest)
        content = path.read_bytes() if path.is_file() else b""
        if sha256(content).hexdigest() == digest:
            return content
        del self._versions[digest]
        return None

    def count(self, version: int) -> int:
        """How many stand for a version."""
        return sum(v == version for v in self._versions.values())

    def forget_before(self, version: int) -> None:
        """Delete those that stand for versions before this one."""
        for digest in [d for d, v in self._versions.items() if v < version]:
            self._path(self._versions.pop(digest), digest).unlink(missing_ok=True)

    def _path(self, version: int, digest: str) -> Path:
        return self._folder / f"{version:05d}-{digest}.safetensors"
