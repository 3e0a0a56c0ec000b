"""Masks over a device's numbers: one of its own, and one with each neighbour that the other takes away again.

Source: Bonawitz et al., arXiv 1611.04482, section 4 (masks, and their recovery after a drop-out); Bell et al., ACM CCS 2020 (few
neighbours). X25519, HKDF, ChaCha20 and the binding to job, group and both devices are our choices.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.contracts.mask_messages import MaskPeer
from fleetune.device_runtime.contracts.secure_sums.graph import neighbours
from fleetune.device_runtime.contracts.secure_sums.grid import Whole, reduced
from fleetune.device_runtime.contracts.secure_sums.keys import Scope, own_stream, pair_stream
from fleetune.device_runtime.contracts.work import SumGrid

_PIECE = 2**15
"""Numbers masked at a time: what a cache holds."""


class Masker(NamedTuple):
    """What one device masks with."""

    scope: Scope
    device_id: str
    place: int
    secret: bytes
    """X25519 private key of its pair masks."""
    seed: bytes
    """Of its own mask."""


class Unmasking(NamedTuple):
    """What takes the masks off a sum, once enough devices have told their shares."""

    scope: Scope
    members: tuple[MaskPeer, ...]
    """Of the group, by place."""
    degree: int
    delivered: tuple[int, ...]
    """Places of those whose updates are in the sum."""
    seeds: Mapping[int, bytes]
    """Of their own masks."""
    secrets: Mapping[int, bytes]
    """Private keys of those who were masked with, and whose updates are not in the sum."""


def mask(numbers: Whole, masker: Masker, peers: Iterable[MaskPeer], grid: SumGrid) -> None:
    """Mask a device's numbers, in place; WireError for a peer's key that is none."""
    _add(numbers, own_stream(masker.seed, masker.scope, masker.device_id), 1)
    for peer in peers:
        pair = (masker.device_id, peer.device_id)
        stream = pair_stream(masker.secret, peer.mask_key, masker.scope, pair)
        _add(numbers, stream, _sign(masker.place, peer.place))
    reduced(numbers, grid)


def unmask(total: Whole, found: Unmasking, grid: SumGrid) -> None:
    """Take off a sum what masks are left in it, in place."""
    for place in found.delivered:
        stream = own_stream(found.seeds[place], found.scope, found.members[place].device_id)
        _add(total, stream, -1)
    there = frozenset(found.delivered)
    for place, secret in found.secrets.items():
        for other in there.intersection(neighbours(place, len(found.members), found.degree)):
            pair = (found.members[place].device_id, found.members[other].device_id)
            stream = pair_stream(secret, found.members[other].mask_key, found.scope, pair)
            _add(total, stream, -_sign(other, place))
    reduced(total, grid)


def _sign(mine: int, theirs: int) -> int:
    return 1 if mine < theirs else -1


def _add(numbers: Whole, stream: Callable[[int], bytes], sign: int) -> None:
    """Add a stream, 8 bytes a number with the lowest first, modulo 2**64: reduced once, at the end, that is the same."""
    add = np.add if sign > 0 else np.subtract
    for start in range(0, numbers.size, _PIECE):
        piece = numbers[start : start + _PIECE]
        add(piece, np.frombuffer(stream(8 * piece.size), "<u8"), out=piece)
