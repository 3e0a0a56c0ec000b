"""Shamir's secret sharing of 32 bytes: any ``threshold`` shares give the secret, fewer give nothing.

``cryptography`` has none; PyCryptodome's takes 16 bytes, and would be a second library of ciphers on a device.

Source: Shamir, "How to share a secret", CACM 22 (1979).
"""

import secrets
from collections.abc import Collection, Mapping, Sequence

from fleetune.device_runtime.errors import WireError

PRIME = 2**257 - 93
"""Modulus of the field: the largest prime below 2**257, above every secret."""
SECRET_BYTES, SHARE_BYTES = 32, 33
HOLDERS_MAX = 2**16


def split(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Share a secret among holders, each a number from 1; equal calls give other shares.

    Raises:
        WireError: a secret of another length, a holder out of range or twice, or more shares needed than there are.
    """
    _check(holders, threshold)
    if len(secret) != SECRET_BYTES:
        raise WireError(f"secret of {len(secret)} bytes; expected {SECRET_BYTES}")
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
    coefficients.append(int.from_bytes(secret, "little"))
    return {holder: _value(coefficients, holder).to_bytes(SHARE_BYTES, "little") for holder in holders}


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret of at least ``threshold`` shares by their holders; of wrong shares comes another secret.

    Raises:
        WireError: too few shares, one of another length or beyond the field, or what they give is no secret.
    """
    holders = sorted(shares)[:threshold]
    _check(holders, threshold)
    total = sum(weight * _number(shares[holder]) for holder, weight in weights(holders).items()) % PRIME
    if total >> (8 * SECRET_BYTES):
        raise WireError("shares that give no secret: one of them is wrong")
    return total.to_bytes(SECRET_BYTES, "little")


def weights(holders: Collection[int]) -> dict[int, int]:
    """Lagrange's weights of these holders' shares at 0."""
    return {holder: _weight(holder, holders) for holder in holders}


def _weight(holder: int, holders: Collection[int]) -> int:
    above, below = 1, 1
    for other in holders:
        if other != holder:
            above, below = above * other % PRIME, below * (other - holder) % PRIME
    return above * pow(below, -1, PRIME) % PRIME


def _value(coefficients: Sequence[int], at: int) -> int:
    total = 0
    for coefficient in coefficients:
        total = (total * at + coefficient) % PRIME
    return total


def _number(share: bytes) -> int:
    if len(share) != SHARE_BYTES or (number := int.from_bytes(share, "little")) >= PRIME:
        raise WireError(f"share of {len(share)} bytes, or beyond the field; expected {SHARE_BYTES}")
    return number


def _check(holders: Sequence[int], threshold: int) -> None:
    if not 1 <= threshold <= len(holders):
        raise WireError(f"{threshold} shares needed, of {len(holders)}")
    if len(set(holders)) != len(holders) or not all(1 <= holder <= HOLDERS_MAX for holder in holders):
        raise WireError(f"holders of shares: different numbers from 1 to {HOLDERS_MAX}")
