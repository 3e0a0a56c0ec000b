"""What is sent of a version to which device: the whole adapter file, or its difference from the one that it holds."""

import logging
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

from fleetune.broker.job import FIXED, Settings
from fleetune.broker.service.freight import sizes_of_file, sizes_of_update
from fleetune.broker.store.store import ByKind, Store
from fleetune.broker.tasks import Packing, Task
from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.device_runtime.contracts.codecs import Codec, make_codec
from fleetune.device_runtime.contracts.deltas import Delta, make_delta
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import FULL, Chunk, Request, TransferManifest
from fleetune.device_runtime.errors import WireError

log = logging.getLogger(__name__)

_SHELF = 6
"""Transfers ready to be served at once: versions, and differences from what devices hold."""
_REPLICAS_MAX = 4
"""Adapters that may stand for one version, or one for each device of a round if a planner packs for each; whoever would need
another gets the whole."""
_KEPT = 3
"""Versions whose replicas are kept; who holds an older one gets the whole."""
_HELD_MAX = 1024
"""Older replicas that are kept for devices that hold them, if a planner packs for each: so many adapters on disk at most."""


class Download(NamedTuple):
    """The fields of an offer that say what its adapter is, and how it travels."""

    adapter: TransferManifest
    adapter_sha256: str
    down_codec: str = FULL
    down_ratio: float = 0.0
    down_bits: int = 0
    reference: str = ""
    is_exact: bool = True
    mask_sha256: str = ""
    mask_bytes: int = 0


class _Ready(NamedTuple):
    outgoing: Outgoing
    download: Download
    payload: bytes
    sizes: ByKind


class _Key(NamedTuple):
    """What a transfer is a function of, beside the size of its chunks."""

    version: int
    held: str
    exactly: bool
    packing: Packing
    mask: bytes
    """That travels with it; empty for none."""


class _Offered(NamedTuple):
    key: _Key
    adapter_sha256: str
    transfer: TransferManifest
    mask_sha256: str
    """Of the mask in force, whether it travels or not; empty for none."""


class Downlink:
    """Chooses and encodes what devices are sent; a wrong belief about one costs a full transfer, never a wrong model."""

    def __init__(self, store: Store, settings: Settings) -> None:
        """Prepare, with the replicas of an earlier life.

        Raises:
            ConfigError: the down codec is unknown, or its ratio or bits wrong.
        """
        self._store, self._usual = (
            store,
            Packing(settings.down_codec, settings.down_ratio, settings.down_bits),
        )
        _codec_of(self._usual)
        self._replicas = store.replicas
        self._is_fixed = settings.traffic == FIXED
        self._replicas_max = _REPLICAS_MAX if self._is_fixed else max(settings.clients, _REPLICAS_MAX)
        self._held: dict[str, str] = {}
        self._same: dict[str, str] = {}
        self._masks: dict[str, str] = {}
        self._offered: dict[str, _Offered] = {}
        self._shelf: dict[_Key, _Ready] = {}

    def holds(self, device_id: str, digest: str, mask: str = "") -> None:
        """A device says which adapter file it holds, empty: it wants the whole; and which mask."""
        digest = self._same.get(digest, digest)
        self._held.pop(device_id, None)  # those heard last come last
        self._held[device_id], self._masks[device_id] = digest, mask

    def counts_as(self, digest: str, version: str) -> None:
        """Who holds the adapter with one SHA-256 can make the version with the other."""
        self._same[digest] = version

    def worked_from(self, device_id: str, version: int) -> None:
        """A device gives what it made of a version: it holds what it was offered of it."""
        offered = self._offered.get(device_id)
        if offered and offered.key.version == version:
            held = offered.adapter_sha256 if self._held.get(device_id) else ""
            self.holds(device_id, held, offered.mask_sha256 or self._masks.get(device_id, ""))

    def size_of(self, task: Task) -> int:
        """Bytes of what a device was offered last, if that was for this task's version; 0 if not."""
        offered = self._offered.get(task.device_id)
        return offered.transfer.size_bytes if offered and offered.key.version == task.version else 0

    def offer(
        self,
        device_id: str,
        version: int,
        *,
        chunk_bytes: int,
        exactly: bool = False,
        packing: Packing | None = None,
        mask: bytes = b"",
    ) -> Download:
        """Have a version ready to be served to a device, in chunks of this size.

        Args:
            device_id: whom to.
            version: which.
            chunk_bytes: size of the chunks.
            exactly: to the bit, also with a lossy codec.
            packing: how; None for the job's way.
            mask: in force in the round; it travels to a device that does not hold it. Empty for none.

        Raises:
            StateError: the store is damaged, or a replica cannot be written.
        """
        packing = packing or self._usual
        held = self._held.get(device_id, "") if packing.codec != FULL else ""
        named = sha256(mask).hexdigest() if mask else ""
        lacking = mask if self._masks.get(device_id) != named else b""
        key = _Key(version, held if held and self._knows(held) else "", exactly, packing, lacking)
        download = self._ready(key, chunk_bytes).download
        self._offered[device_id] = _Offered(key, download.adapter_sha256, download.adapter, named)
        return download._replace(mask_sha256=named)

    def chunks(self, device_id: str, request: Request) -> Iterator[Chunk]:
        """What is asked for; WireError if it is not offered, or as :meth:`Outgoing.chunks`."""
        return self._asked_for(device_id, request).outgoing.chunks(request)

    def sizes(self, device_id: str, request: Request) -> ByKind:
        """What the transfer is made of whose chunks are asked for; WireError if it is not offered."""
        return self._asked_for(device_id, request).sizes

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
        self._replicas.forget_before(version - _KEPT + 1, but=self._held_by_planned())

    def _asked_for(self, device_id: str, request: Request) -> _Ready:
        found = next((r for r in self._shelf.values() if r.download.adapter.sha256 == request.sha256), None)
        found = found or self._again(device_id, request.sha256)
        if found is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not offered")
        return found

    def _ready(self, key: _Key, chunk_bytes: int) -> _Ready:
        ready = self._shelf.pop(key, None)
        if ready is None or ready.download.adapter.chunk_bytes != chunk_bytes:
            ready = self._prepared(key, chunk_bytes)
        self._shelf[key] = ready
        while len(self._shelf) > _SHELF:
            del self._shelf[next(iter(self._shelf))]
        return ready

    def _again(self, device_id: str, digest: str) -> _Ready | None:
        """Make anew what a device was offered last: others were served in between. None if that was something else."""
        offered = self._offered.get(device_id)
        if offered is None or offered.transfer.sha256 != digest:
            return None
        ready = self._ready(offered.key, offered.transfer.chunk_bytes)
        return ready if ready.download.adapter.sha256 == digest else None

    def _held_by_planned(self) -> set[str]:
        """What devices hold, of those heard last: a planner packs also for one that was away for long."""
        return set() if self._is_fixed else set(islice(reversed(self._held.values()), _HELD_MAX))

    def _knows(self, digest: str) -> bool:
        return self._replicas.knows(digest) or self._store.version_with(digest) is not None

    def _prepared(self, key: _Key, chunk_bytes: int) -> _Ready:
        ready = self._from_held(key, chunk_bytes) if key.held else None
        return _with_mask(
            ready or _whole(self._store.version(key.version), chunk_bytes), key.mask, chunk_bytes
        )

    def _from_held(self, key: _Key, chunk_bytes: int) -> _Ready | None:
        """What a device that holds an adapter is sent of a version; None if that is the whole of it."""
        version, held, exactly, packing, _ = key
        base = self._content(held)
        if base is not None and not exactly and self._replicas.stands_for(version, held):
            # It is at work on this, and would start over with another.
            return _whole(base, chunk_bytes, is_exact=False)
        content = self._store.version(version)
        delta = self._delta(packing, content, base) if base is not None else None
        is_exact = delta is not None and delta.content == content
        if delta is None or not (is_exact or (not exactly and self._may_stand_for(version, delta.content))):
            return None
        if not is_exact:
            self._replicas.keep(version, delta.content)
        outgoing, digest = Outgoing(delta.payload, chunk_bytes=chunk_bytes), sha256(delta.content).hexdigest()
        how = (packing.codec, packing.ratio, packing.bits)
        download = Download(outgoing.manifest, digest, *how, held, is_exact=is_exact)
        return _Ready(outgoing, download, delta.payload, sizes_of_update(delta.payload))

    def _may_stand_for(self, version: int, content: bytes) -> bool:
        is_kept = self._replicas.stands_for(version, sha256(content).hexdigest())
        return is_kept or self._replicas.count(version) < self._replicas_max

    def _content(self, digest: str) -> bytes | None:
        if (replica := self._replicas.content(digest)) is not None:
            return replica
        number = self._store.version_with(digest)
        return None if number is None else self._store.version(number)

    def _delta(self, packing: Packing, content: bytes, base: bytes) -> Delta | None:
        codec = _codec_of(packing)
        assert codec
        try:
            return make_delta(codec, parse_arrays(content), parse_arrays(base))
        except WireError as exc:
            log.warning("a version is sent whole: %s", exc)
            return None


def _codec_of(packing: Packing) -> Codec | None:
    return None if packing.codec == FULL else make_codec(packing.codec, packing.ratio, packing.bits)


def _whole(content: bytes, chunk_bytes: int, *, is_exact: bool = True) -> _Ready:
    outgoing = Outgoing(content, chunk_bytes=chunk_bytes)
    download = Download(outgoing.manifest, outgoing.manifest.sha256, is_exact=is_exact)
    return _Ready(outgoing, download, content, sizes_of_file(content))


def _with_mask(ready: _Ready, mask: bytes, chunk_bytes: int) -> _Ready:
    """Put a mask behind what travels, in the same transfer."""
    if not mask:
        return ready
    payload = ready.payload + mask
    outgoing, sizes = Outgoing(payload, chunk_bytes=chunk_bytes), ready.sizes + ByKind(positions=len(mask))
    download = ready.download._replace(adapter=outgoing.manifest, mask_bytes=len(mask))
    return _Ready(outgoing, download, payload, sizes)
