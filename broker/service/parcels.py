"""A version ready to be served: as its file, or as a difference, with a mask behind it or not."""

from hashlib import sha256
from typing import NamedTuple

from fleetune.broker.service.freight import sizes_of_file, sizes_of_update
from fleetune.broker.store.store import ByKind
from fleetune.broker.tasks import Packing
from fleetune.device_runtime.contracts.deltas import Delta
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import TransferManifest
from fleetune.device_runtime.contracts.work import FULL


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


class Parcel(NamedTuple):
    """A transfer, what an offer says of it, and what it is made of."""

    outgoing: Outgoing
    download: Download
    payload: bytes
    sizes: ByKind


def whole(content: bytes, chunk_bytes: int, *, is_exact: bool = True) -> Parcel:
    """Make an adapter file ready as it is."""
    outgoing = Outgoing(content, chunk_bytes=chunk_bytes)
    download = Download(outgoing.manifest, outgoing.manifest.sha256, is_exact=is_exact)
    return Parcel(outgoing, download, content, sizes_of_file(content))


def difference(
    delta: Delta, packing: Packing, held: str, chunk_bytes: int, *, is_exact: bool = True
) -> Parcel:
    """Make a difference ready, from the adapter file whose SHA-256 is ``held``."""
    outgoing, digest = Outgoing(delta.payload, chunk_bytes=chunk_bytes), sha256(delta.content).hexdigest()
    how = (packing.codec, packing.ratio, packing.bits)
    download = Download(outgoing.manifest, digest, *how, held, is_exact=is_exact)
    return Parcel(outgoing, download, delta.payload, sizes_of_update(delta.payload))


def with_mask(parcel: Parcel, mask: bytes, chunk_bytes: int) -> Parcel:
    """Put a mask, if it is not empty, behind what travels, in the same transfer."""
    if not mask:
        return parcel
    payload = parcel.payload + mask
    outgoing, sizes = Outgoing(payload, chunk_bytes=chunk_bytes), parcel.sizes + ByKind(positions=len(mask))
    download = parcel.download._replace(adapter=outgoing.manifest, mask_bytes=len(mask))
    return Parcel(outgoing, download, payload, sizes)
