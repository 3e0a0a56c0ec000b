"""Shares that devices have told, and the secrets that they give: each is compared with what its device told of it before."""

from collections.abc import Iterator, Mapping

from fleetune.device_runtime.contracts.mask_messages import MaskKeys, MaskReveal
from fleetune.device_runtime.contracts.secure_sums.keys import digest_of_seed, public_of
from fleetune.device_runtime.contracts.secure_sums.shares import combine
from fleetune.device_runtime.errors import WireError

SEED, SECRET = KINDS = ("seed", "secret")
"""Of a device's own mask; its private key of the masks with others."""


class ToldShares:
    """Of one group; a secret once found is kept."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], dict[int, bytes]] = {}
        """By kind of secret and place of whose it is, by who holds them, numbered from 1."""
        self._found: dict[tuple[str, int], bytes] = {}

    def take(self, reveal: MaskReveal, place: int) -> None:
        """Take what the device at ``place`` tells."""
        for kind, shares in ((SEED, reveal.seeds), (SECRET, reveal.secrets)):
            for share in shares:
                self._told.setdefault((kind, share.place), {})[place + 1] = share.data

    def count(self, kind: str, place: int) -> int:
        """How many shares of a secret are told."""
        return len(self._told.get((kind, place), {}))

    def secret(self, kind: str, place: int, keys: MaskKeys, threshold: int) -> bytes:
        """The secret of the device at ``place``, which told ``keys``; empty while its shares are too few or do not fit."""
        if found := self._found.get((kind, place)):
            return found
        shares = self._told.get((kind, place), {})
        found = next(_fitting(kind, shares, keys, threshold), b"") if len(shares) >= threshold else b""
        return self._found.setdefault((kind, place), found) if found else b""


def _fitting(kind: str, shares: Mapping[int, bytes], keys: MaskKeys, threshold: int) -> Iterator[bytes]:
    for holders in _choices(sorted(shares), threshold):
        try:
            secret = combine({holder: shares[holder] for holder in holders}, threshold)
        except WireError:
            continue
        expected = keys.seed_digest if kind == SEED else keys.mask_key
        if expected == (digest_of_seed(secret) if kind == SEED else public_of(secret)):
            yield secret


def _choices(holders: list[int], count: int) -> Iterator[list[int]]:
    """``count`` holders, then as many without each one: if one has told something wrong, some of these are without it."""
    yield holders[:count]
    for left_out in holders[:count] if len(holders) > count else ():
        yield [holder for holder in holders if holder != left_out][:count]
