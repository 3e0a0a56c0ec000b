"""What is sent of a version to which device: its difference from one that the device holds, or the whole adapter file."""

import logging
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

from fleetune.broker.jobs.settings import FIXED, Settings
from fleetune.broker.service.holdings import Holdings
from fleetune.broker.service.parcels import Download, Parcel, difference, whole, with_mask
from fleetune.broker.store.store import ByKind, Store
from fleetune.broker.tasks import Packing, Task
from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.device_runtime.contracts.codecs import Codec, by_nearest, make_codec
from fleetune.device_runtime.contracts.deltas import Delta, make_delta
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.contracts.transfer import CHUNK_BYTES_MIN
from fleetune.device_runtime.contracts.wire import Chunk, Request, TransferManifest
from fleetune.device_runtime.contracts.work import FULL, WHOLE
from fleetune.device_runtime.errors import StateError, WireError

log = logging.getLogger(__name__)

_SHELF_MIN, _SHELF_MAX, _SHELF_BYTES = 6, 64, 64 * 1024 * 1024
"""Transfers ready to be served at once, versions and differences: at least so many, at most so many, or as many bytes."""
_REPLICAS_MIN, _REPLICAS_MAX = 4, 64
"""Adapters that may stand for one version: one for each device of a round, from so many to so many, or without that bound if a
planner packs for each. Whoever would need another gets the version to the bit."""
_BASES_MIN, _BASES_MAX = 4, 62
"""Adapters that differences to the bit of a version are taken from: so many to so many. Who holds another gets the whole."""
_SHARED = 2
"""Transfers of a version that many have in common: the whole, and the difference from version 0."""
_KEPT = 3
"""Versions whose replicas are all kept."""
_HELD_MAX = 1024
"""Older replicas that are kept for the devices heard last, which hold them: so many adapters on disk at most."""
_LOSSLESS = Packing("xor")
_PARTIAL = ("topk",)
"""Codecs that leave most elements as they were: of a head of class means, which is new as a whole, they would make none."""


class _Key(NamedTuple):
    """What a transfer is a function of, beside the size of its chunks."""

    version: int
    held: str
    """By the device, and known here; empty for none."""
    has_original: bool
    """Whether it holds version 0 besides."""
    packing: Packing
    """``FULL``: to the bit; ``WHOLE``: whole."""
    mask: bytes
    """That travels with it; empty for none."""
    chunk_bytes: int = 0
    """Size of the chunks."""


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
        self._clients, self._is_fixed = settings.clients, settings.traffic == FIXED
        self._has_head = settings.head_rounds > 0
        first = self._version(0) or b""
        self._holdings = Holdings(sha256(first).hexdigest())
        self._bases_max = max(_BASES_MIN, min(_BASES_MAX, _fitting(len(first)) - _SHARED))
        self._bases: set[str] = set()
        """What the newest version was taken from to the bit."""
        self._offered: dict[str, _Offered] = {}
        self._chunk_limits: dict[str, int] = {}
        """Largest chunk that a device is offered, where its connection broke under larger ones."""
        self._served: set[str] = set()
        """Devices that were sent chunks since their last hello, or since they gave what they made."""
        self._shelf: dict[_Key, Parcel] = {}
        self._shelf_bytes = 0

    def holds(self, device_id: str, digest: str, mask: str = "", *, original: str = "") -> None:
        """A device says which adapter file it holds, empty: it wants the whole; which its artifact brought, and which mask."""
        if device_id in self._served:
            # It was cut off while it fetched, or has waited for long: smaller chunks may get through.
            limit = self._chunk_limits.get(device_id, CHUNK_BYTES) // 2
            self._chunk_limits[device_id] = max(CHUNK_BYTES_MIN, limit)
            self._served.discard(device_id)
        self._holdings.say(device_id, digest, mask, original=original)

    def makes_original(self, digest: str) -> None:
        """Who holds the adapter file with this SHA-256 can make version 0 of it, and is taken to hold that."""
        self._holdings.makes_original(digest)

    def worked_from(self, device_id: str, version: int) -> None:
        """A device gives what it made of a version: it holds what it was offered of it."""
        self._served.discard(device_id)
        if (limit := self._chunk_limits.pop(device_id, CHUNK_BYTES)) < CHUNK_BYTES // 2:
            self._chunk_limits[device_id] = 2 * limit
        offered = self._offered.get(device_id)
        if offered and offered.key.version == version:
            held = offered.adapter_sha256 if self._holdings.adapter(device_id) else ""
            self._holdings.take(device_id, held, offered.mask_sha256 or self._holdings.mask(device_id))

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
        named = sha256(mask).hexdigest() if mask else ""
        lacking = mask if self._holdings.mask(device_id) != named else b""
        key = self._key(device_id, version, Packing(FULL) if exactly and packing.codec != WHOLE else packing)
        chunk_bytes = min(chunk_bytes, self._chunk_limits.get(device_id, chunk_bytes))
        key = key._replace(mask=lacking, chunk_bytes=chunk_bytes)
        download = self._ready(key).download
        self._offered[device_id] = _Offered(key, download.adapter_sha256, download.adapter, named)
        return download._replace(mask_sha256=named)

    def chunks(self, device_id: str, request: Request) -> Iterator[Chunk]:
        """What is asked for; WireError if it is not offered, or as :meth:`Outgoing.chunks`."""
        found = self._asked_for(device_id, request)
        self.serves(device_id)
        return found.outgoing.chunks(request)

    def serves(self, device_id: str) -> None:
        """A device is sent chunks."""
        self._served.add(device_id)

    def has_smaller(self, device_id: str, chunk_bytes: int) -> bool:
        """Whether what a device was offered is in larger chunks than it should be by now, and has to be offered anew."""
        offered = self._offered.get(device_id)
        return offered is not None and offered.transfer.chunk_bytes > chunk_bytes

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
        self._bases.clear()
        for key in [key for key in self._shelf if key.version < version]:
            if self._shelf_bytes > _SHELF_BYTES:  # who still fetches one has it made ready anew
                self._take_down(key)
        self._replicas.forget_before(version - _KEPT + 1, but=self.held())

    def held(self) -> set[str]:
        """SHA-256 of the adapter files that the devices heard last hold: what they are sent next is taken from these."""
        return self._holdings.lately(_HELD_MAX)

    def _key(self, device_id: str, version: int, packing: Packing) -> _Key:
        """What a device gets of a version, without a mask."""
        if packing.codec == WHOLE:
            return _Key(version, "", False, packing, b"")
        held = self._holdings.adapter(device_id)
        known = held if held and self._knows(held) else ""
        if packing.codec == FULL and not self._may_be_base(version, known):
            known = ""  # all who get the whole share it
        return _Key(version, known, self._holdings.has_original(device_id), packing, b"")

    def _asked_for(self, device_id: str, request: Request) -> Parcel:
        found = self._again(device_id, request.sha256)
        found = found or next(
            (r for r in self._shelf.values() if r.download.adapter.sha256 == request.sha256), None
        )
        if found is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not offered")
        return found

    def _ready(self, key: _Key) -> Parcel:
        ready = self._take_down(key) or self._prepared(key)
        self._shelf[key] = ready
        self._shelf_bytes += len(ready.payload)
        while self._is_shelf_full:
            self._take_down(next(iter(self._shelf)))
        return ready

    def _take_down(self, key: _Key) -> Parcel | None:
        if (found := self._shelf.pop(key, None)) is not None:
            self._shelf_bytes -= len(found.payload)
        return found

    @property
    def _is_shelf_full(self) -> bool:
        return len(self._shelf) > (_SHELF_MIN if self._shelf_bytes > _SHELF_BYTES else _SHELF_MAX)

    def _again(self, device_id: str, digest: str) -> Parcel | None:
        """Make anew what a device was offered last: others were served in between. None if that was something else."""
        offered = self._offered.get(device_id)
        if offered is None or offered.transfer.sha256 != digest:
            return None
        if offered.key not in self._shelf and not self._is_kept(offered.key.version):
            return None
        ready = self._ready(offered.key)
        return ready if ready.download.adapter.sha256 == digest else None

    def _is_kept(self, version: int) -> bool:
        """Whether a version that was offered once can be made ready anew."""
        return self._version(version) is not None

    def _knows(self, digest: str) -> bool:
        return self._replicas.knows(digest) or self._store.version_with(digest) is not None

    def _prepared(self, key: _Key) -> Parcel:
        content, chunk_bytes = self._store.version(key.version), key.chunk_bytes
        ready = self._as_packed(key, content, chunk_bytes) or self._to_the_bit(key, content, chunk_bytes)
        return with_mask(ready or whole(content, chunk_bytes), key.mask, chunk_bytes)

    def _as_packed(self, key: _Key, content: bytes, chunk_bytes: int) -> Parcel | None:
        """What the packing makes of a version for a device that holds an adapter; None if it is to be exact, or must be."""
        version, held = key.version, key.held
        lacks_head = self._has_head and held == self._holdings.original and key.packing.codec in _PARTIAL
        if lacks_head or not held or key.packing.codec in (FULL, WHOLE):
            return None
        if (base := self._content(held)) is None:
            return None
        if self._replicas.stands_for(version, held):
            # It is at work on this, and would start over with another.
            return whole(base, chunk_bytes, is_exact=False)
        delta = self._delta(key.packing, content, base)
        if delta is None:
            return None
        is_exact = delta.content == content
        if not is_exact:
            if not self._may_stand_for(version, delta):
                return None
            self._replicas.keep(version, delta.content)
        return difference(delta, key.packing, held, chunk_bytes, is_exact=is_exact)

    def _to_the_bit(self, key: _Key, content: bytes, chunk_bytes: int) -> Parcel | None:
        """A difference that loses nothing, from what a device holds or else from version 0; None if the whole is as short."""
        for held in (key.held, self._holdings.original if key.has_original else ""):
            base = self._content(held) if held and self._may_be_base(key.version, held) else None
            if base is not None:
                delta = self._delta(_LOSSLESS, content, base) if base != content else None
                is_shorter = delta is not None and len(delta.payload) < len(content)
                return difference(delta, _LOSSLESS, held, chunk_bytes) if delta and is_shorter else None
        return None

    def _may_be_base(self, version: int, digest: str) -> bool:
        """Whether a difference to the bit of a version may be taken from an adapter: of the newest, from so many."""
        if version != self._store.newest or digest in ("", self._holdings.original, *self._bases):
            return True
        if len(self._bases) >= self._bases_max:
            return False
        self._bases.add(digest)
        return True

    def _may_stand_for(self, version: int, delta: Delta) -> bool:
        most = self._clients
        if self._is_fixed:
            most = min(most, _REPLICAS_MAX, _fitting(len(delta.payload)))
        is_kept = self._replicas.stands_for(version, sha256(delta.content).hexdigest())
        return is_kept or self._replicas.count(version) < max(most, _REPLICAS_MIN)

    def _content(self, digest: str) -> bytes | None:
        if (replica := self._replicas.content(digest)) is not None:
            return replica
        number = self._store.version_with(digest)
        return None if number is None else self._version(number)

    def _version(self, number: int) -> bytes | None:
        """A version that others may be taken from; None if its file is gone or damaged: then they go without it."""
        try:
            return self._store.version(number)
        except StateError as exc:
            log.warning("no difference is taken from version %d: %s", number, exc)
            return None

    def _delta(self, packing: Packing, content: bytes, base: bytes) -> Delta | None:
        codec = _codec_of(packing)
        assert codec
        try:
            return make_delta(codec, parse_arrays(content), parse_arrays(base))
        except WireError as exc:
            log.warning("a version is sent whole: %s", exc)
            return None


def _codec_of(packing: Packing) -> Codec | None:
    """What the aggregator packs with: it knows what each device holds, so what is lost goes with the next difference."""
    if packing.codec in (FULL, WHOLE):
        return None
    return by_nearest(make_codec(packing.codec, packing.ratio, packing.bits))


def _fitting(size_bytes: int) -> int:
    """How many transfers of this size lie ready at once: more would be made anew for every few chunks."""
    return _SHELF_BYTES // max(size_bytes, 1)
