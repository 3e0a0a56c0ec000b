"""Messages of updates that are summed under masks: keys, groups, shares, and what is revealed in the end."""

from typing import Annotated

import msgspec
from msgspec import Meta

from fleetune.device_runtime.contracts.fields import (
    NEIGHBOURS_MAX,
    VERSION,
    Certificate,
    CertificateSignature,
    Count,
    Key32,
    Places,
    TaskId,
    Word,
)


class MaskPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a group, as the others are told of it."""

    place: Count
    device_id: Word
    mask_key: Key32
    """X25519 public key of its pair masks."""
    share_key: Key32
    """X25519 public key that shares are sealed for."""
    certificate: Certificate = b""
    """Of the device, DER; empty where nobody vouches for its keys."""
    signature: CertificateSignature = b""
    """Of that certificate's key over job, group, device and both keys."""


class MaskShare(msgspec.Struct, frozen=True, kw_only=True):
    """Something of, or for, the device at a place of a group."""

    place: Count
    data: Annotated[bytes, Meta(max_length=128)]


Peers = Annotated[list[MaskPeer], Meta(max_length=NEIGHBOURS_MAX)]
Shares = Annotated[list[MaskShare], Meta(max_length=NEIGHBOURS_MAX + 1)]


class MaskKeys(msgspec.Struct, frozen=True, kw_only=True, tag="mask_keys"):
    """A device's keys for one task of codec ``masked``; repeated until a MaskGroup comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    mask_key: Key32
    """As of MaskPeer."""
    share_key: Key32
    """As of MaskPeer."""
    seed_digest: Key32
    """SHA-256 of the seed of its own mask."""
    certificate: Certificate = b""
    """As of MaskPeer."""
    signature: CertificateSignature = b""
    """As of MaskPeer."""


class MaskGroup(msgspec.Struct, frozen=True, kw_only=True, tag="mask_group"):
    """Whom a device masks with, and is to share its secrets with."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    """Name of the devices that are summed together, another for each attempt."""
    place: Count
    """The device's own."""
    mask_key: Key32
    """The device's own, as it was heard: one that has made others since takes no part."""
    threshold: Count
    """Shares that give a secret."""
    peers: Peers


class MaskShares(msgspec.Struct, frozen=True, kw_only=True, tag="mask_shares"):
    """A device's two secrets in shares, sealed for each of its neighbours; repeated until a MaskInbox comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    shares: Shares
    """By the place of whom they are for."""


class MaskInbox(msgspec.Struct, frozen=True, kw_only=True, tag="mask_inbox"):
    """What a device's neighbours sealed for it: it masks with these, and no others."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    shares: Shares
    """By the place of whom they are from."""


class MaskAsk(msgspec.Struct, frozen=True, kw_only=True, tag="mask_ask"):
    """Whose updates are in the sum: of these a device tells the shares of their own seeds, of the others those of their keys."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    delivered: Places
    dropped: Places


class MaskReveal(msgspec.Struct, frozen=True, kw_only=True, tag="mask_reveal"):
    """A device's answer to a MaskAsk; the same again if it is asked again, and none to another."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    seeds: Shares
    """Shares of the seeds of those that delivered, by their places."""
    secrets: Shares
    """Shares of the private mask keys of those that dropped out."""
