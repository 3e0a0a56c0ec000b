"""What the aggregator remembers of each device's updates, for codecs whose receiver has a memory: files, one a device.

A memory is durable before the verdict on the update that it comes from, and is named by that update: what counts is the memory of
the last update that was accepted. Of a device there is one more for each update that is in no version yet, of all devices
DEVICES_MAX; whose memory is gone sends its next update without.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.codecs.codec import chain_of
from fleetune.device_runtime.files import DiskFiles, Files, MemoryFiles

DEVICES_MAX = 1024
"""Memories kept when a version is made; each takes 4 bytes a parameter that travelled."""
_NAME = re.compile(r"(\d+)-([0-9a-f]{16})-([0-9a-f]{64})-([0-9a-f]{64})\.safetensors")


class _Kept(NamedTuple):
    version: int
    """That the update started from."""
    device: str
    update: str
    """SHA-256 of its payload."""
    content: str
    """SHA-256 of the file."""

    @property
    def file(self) -> str:
        return f"{self.version:05d}-{self.device}-{self.update}-{self.content}.safetensors"


class Memories:
    """The memories of one job."""

    def __init__(self, folder: Path | None = None) -> None:
        """Find those of an earlier life; without a folder they are kept in memory."""
        self._folder = folder
        names = self._files.names() if folder and folder.is_dir() else []
        found = [_Kept(int(n[1]), n[2], n[3], n[4]) for n in map(_NAME.fullmatch, names) if n]
        self._kept = {(kept.device, kept.update): kept for kept in sorted(found)}
        self._chains: dict[tuple[str, str], str] = {}

    @property
    def is_empty(self) -> bool:
        """Whether nothing is remembered of anyone."""
        return not self._kept

    def keep(self, device_id: str, update: str, memory: Arrays, *, version: int) -> None:
        """Keep what an update leaves, by the SHA-256 of its payload; StateError if it cannot be written."""
        device, content = _key(device_id), to_bytes(memory)
        if (device, update) not in self._kept:
            kept = _Kept(version, device, update, sha256(content).hexdigest())
            self._files.write(kept.file, content)
            self._kept[device, update] = kept
        self._chains[device, update] = chain_of(memory)

    def chain(self, device_id: str, update: str | None) -> str:
        """Chain of the memory that an update left; empty if there is none."""
        place = (_key(device_id), update or "")
        if place not in self._chains and place in self._kept:
            self._chains[place] = chain_of(self._read(self._kept[place]))
        return self._chains.get(place, "")

    def find(self, device_id: str, chain: str) -> Arrays | None:
        """The memory of a device with this chain; None if it is not kept, or damaged."""
        updates = [update for device, update in self._kept if device == _key(device_id)]
        found = [update for update in updates if self.chain(device_id, update) == chain]
        return self._read(self._kept[_key(device_id), found[0]]) or None if found else None

    def sweep(self, newest: Iterable[tuple[str, str | None]]) -> None:
        """Delete what is no more needed once a version is made.

        Args:
            newest: devices of the updates in it, with the SHA-256 of the last accepted update of each.
        """
        last = {_key(device_id): update for device_id, update in newest}
        for place, kept in [*self._kept.items()]:
            if kept.device in last and kept.update != last[kept.device]:
                self._forget(place)
        for place in [place for place, _ in sorted(self._kept.items(), key=lambda item: item[1])][
            :-DEVICES_MAX
        ]:
            self._forget(place)

    def _read(self, kept: _Kept) -> Arrays:
        content = self._files.read(kept.file) or b""
        if sha256(content).hexdigest() == kept.content:
            return parse_arrays(content)
        self._forget((kept.device, kept.update))
        return {}

    def _forget(self, place: tuple[str, str]) -> None:
        self._files.delete(self._kept.pop(place).file)
        self._chains.pop(place, None)

    @cached_property
    def _files(self) -> Files:
        """Opened when first needed: most jobs have no folder for them."""
        return DiskFiles(self._folder) if self._folder else MemoryFiles()


def _key(device_id: str) -> str:
    return sha256(device_id.encode()).hexdigest()[:16]
