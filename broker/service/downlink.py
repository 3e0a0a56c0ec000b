"""What is sent of a version to which device: the whole adapter file, or its difference from the one that it holds."""

import logging
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

from fleetune.broker.job import Settings
from fleetune.broker.store.store import Store
from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.device_runtime.contracts.codecs import make_codec
from fleetune.device_runtime.contracts.deltas import Delta, make_delta
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import FULL, Chunk, Request, TransferManifest
from fleetune.device_runtime.errors import WireError

log = logging.getLogger(__name__)

_SHELF = 6
"""Transfers ready to be served at once: versions, and differences from what devices hold."""
_REPLICAS_MAX = 4
"""Adapters that may stand for one version; whoever would need another gets the whole."""
_KEPT = 3
"""Versions whose replicas are kept; who holds an older one gets the whole."""


class Download(NamedTuple):
    """The fields of an offer that say what its adapter is, and how it travels."""

    adapter: TransferManifest
    adapter_sha256: str
    down_codec: str = FULL
    down_ratio: float = 0.0
    reference: str = ""
    is_exact: bool = True
    mask_sha256: str = ""
    mask_bytes: int = 0


class _Ready(NamedTuple):
    outgoing: Outgoing
    download: Download
    payload: bytes


class _Key(NamedTuple):
    version: int
    held: str
    exactly: bool
    mask: bytes
    """That travels with it; empty for none."""


class Downlink:
    """Chooses and encodes what devices are sent; a wrong belief about one costs a full transfer, never a wrong model."""

    def __init__(self, store: Store, settings: Settings) -> None:
        """Prepare, with the replicas of an earlier life.

        Raises:
            ConfigError: the down codec is unknown, or its ratio wrong.
        """
        self._store, self._name, self._ratio = store, settings.down_codec, settings.down_ratio
        self._codec = None if self._name == FULL else make_codec(self._name, self._ratio)
        self._replicas = store.replicas
        self._held: dict[str, str] = {}
        self._offered: dict[str, tuple[int, str, str]] = {}
        self._masks: dict[str, str] = {}
        self._shelf: dict[_Key, _Ready] = {}

    def holds(self, device_id: str, digest: str, mask: str = "") -> None:
        """A device says which adapter file it holds, empty: it wants the whole; and which mask."""
        self._held[device_id], self._masks[device_id] = digest, mask

    def worked_from(self, device_id: str, version: int) -> None:
        """A device gives what it made of a version: it holds what it was offered of it."""
        offered, digest, mask = self._offered.get(device_id, (-1, "", ""))
        if offered == version and self._held.get(device_id):
            self._held[device_id] = digest
        if offered == version and mask:
            self._masks[device_id] = mask

    def offer(
        self, device_id: str, version: int, *, chunk_bytes: int, exactly: bool = False, mask: bytes = b""
    ) -> Download:
        """Have a version ready to be served to a device, in chunks of this size.

        Args:
            device_id: whom to.
            version: which.
            chunk_bytes: size of the chunks.
            exactly: to the bit, also with a lossy codec.
            mask: in force in the round; it travels to a device that does not hold it. Empty for none.

        Raises:
            StateError: the store is damaged, or a replica cannot be written.
        """
        held = self._held.get(device_id, "") if self._codec else ""
        named = sha256(mask).hexdigest() if mask else ""
        lacking = mask if self._masks.get(device_id) != named else b""
        key = _Key(version, held if held and self._knows(held) else "", exactly, lacking)
        ready = self._shelf.pop(key, None)
        if ready is None or ready.download.adapter.chunk_bytes != chunk_bytes:
            ready = self._prepared(key, chunk_bytes)
        self._shelf[key] = ready
        while len(self._shelf) > _SHELF:
            del self._shelf[next(iter(self._shelf))]
        self._offered[device_id] = version, ready.download.adapter_sha256, named
        return ready.download._replace(mask_sha256=named)

    def chunks(self, request: Request) -> Iterator[Chunk]:
        """What is asked for; WireError if it is not offered, or as :meth:`Outgoing.chunks`."""
        found = next((r for r in self._shelf.values() if r.download.adapter.sha256 == request.sha256), None)
        if found is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not offered")
        return found.outgoing.chunks(request)

    def replica(self, version: int, digest: str) -> Arrays:
        """Tensors of the replica of a version that has this SHA-256.

        Raises:
            WireError: no device was offered it for this version, or it is not kept any more.
        """
        content = self._replicas.content(digest) if self._replicas.stands_for(version, digest) else None
        if content is None:
            raise WireError(
                f"update from adapter {digest[:12]!r}, which does not stand for version {version}"
            )
        return parse_arrays(content)

    def close(self, version: int) -> None:
        """A version is the newest now: replicas of old ones go."""
        self._replicas.forget_before(version - _KEPT + 1)

    def _knows(self, digest: str) -> bool:
        return self._replicas.knows(digest) or self._store.version_with(digest) is not None

    def _prepared(self, key: _Key, chunk_bytes: int) -> _Ready:
        version, held, exactly, mask = key
        ready = self._from_held(version, held, exactly=exactly, chunk_bytes=chunk_bytes) if held else None
        return _with_mask(ready or _whole(self._store.version(version), chunk_bytes), mask, chunk_bytes)

    def _from_held(self, version: int, held: str, *, exactly: bool, chunk_bytes: int) -> _Ready | None:
        """What a device that holds an adapter is sent of a version; None if that is the whole of it."""
        base = self._content(held)
        if base is not None and not exactly and self._replicas.stands_for(version, held):
            # It is at work on this, and would start over with another.
            return _whole(base, chunk_bytes, is_exact=False)
        content = self._store.version(version)
        delta = self._delta(content, base) if base is not None else None
        is_exact = delta is not None and delta.content == content
        if delta is None or not (is_exact or (not exactly and self._may_stand_for(version, delta.content))):
            return None
        if not is_exact:
            self._replicas.keep(version, delta.content)
        outgoing, digest = Outgoing(delta.payload, chunk_bytes=chunk_bytes), sha256(delta.content).hexdigest()
        download = Download(outgoing.manifest, digest, self._name, self._ratio, held, is_exact=is_exact)
        return _Ready(outgoing, download, delta.payload)

    def _may_stand_for(self, version: int, content: bytes) -> bool:
        is_kept = self._replicas.stands_for(version, sha256(content).hexdigest())
        return is_kept or self._replicas.count(version) < _REPLICAS_MAX

    def _content(self, digest: str) -> bytes | None:
        if (replica := self._replicas.content(digest)) is not None:
            return replica
        number = self._store.version_with(digest)
        return None if number is None else self._store.version(number)

    def _delta(self, content: bytes, base: bytes) -> Delta | None:
        assert self._codec
        try:
            return make_delta(self._codec, parse_arrays(content), parse_arrays(base))
        except WireError as exc:
            log.warning("a version is sent whole: %s", exc)
            return None


def _whole(content: bytes, chunk_bytes: int, *, is_exact: bool = True) -> _Ready:
    outgoing = Outgoing(content, chunk_bytes=chunk_bytes)
    return _Ready(outgoing, Download(outgoing.manifest, outgoing.manifest.sha256, is_exact=is_exact), content)


def _with_mask(ready: _Ready, mask: bytes, chunk_bytes: int) -> _Ready:
    """Put a mask behind what travels, in the same transfer."""
    if not mask:
        return ready
    payload = ready.payload + mask
    outgoing = Outgoing(payload, chunk_bytes=chunk_bytes)
    return _Ready(outgoing, ready.download._replace(adapter=outgoing.manifest, mask_bytes=len(mask)), payload)
