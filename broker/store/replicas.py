"""Adapters that devices have in place of a version, after a lossy codec: files named by version and SHA-256."""

import re
from collections.abc import Collection
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from fleetune.device_runtime.files import DiskFiles, Files, MemoryFiles

_NAME = re.compile(r"(\d+)-([0-9a-f]{64})\.safetensors")


class Replicas:
    """The replicas of one job; what devices work from is durable before it is offered."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find those of an earlier life; without a folder they are kept in memory."""
        self._folder = folder
        names = self._files.names() if folder and folder.is_dir() else []
        self._kept = {(int(name[1]), name[2]) for name in map(_NAME.fullmatch, names) if name}

    def keep(self, version: int, content: bytes) -> None:
        """Keep an adapter file that stands for a version; StateError if it cannot be written."""
        replica = (version, sha256(content).hexdigest())
        if replica not in self._kept:
            self._files.write(_file(*replica), content)
            self._kept.add(replica)

    def stands_for(self, version: int, digest: str) -> bool:
        """Whether the adapter file with this SHA-256 stands for a version."""
        return (version, digest) in self._kept

    def content(self, digest: str) -> bytes | None:
        """The adapter file with this SHA-256; None if it is not kept, or damaged: then it is forgotten."""
        for replica in [r for r in self._kept if r[1] == digest]:
            content = self._files.read(_file(*replica)) or b""
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

    def forget_before(self, version: int, *, but: Collection[str] = ()) -> None:
        """Delete those that stand for versions before this one, except some by their SHA-256."""
        for replica in [r for r in self._kept if r[0] < version and r[1] not in but]:
            self._kept.discard(replica)
            self._files.delete(_file(*replica))

    @cached_property
    def _files(self) -> Files:
        """Opened when first needed: a job without replicas has no folder for them."""
        return DiskFiles(self._folder) if self._folder else MemoryFiles()


def _file(version: int, digest: str) -> str:
    return f"{version:05d}-{digest}.safetensors"
