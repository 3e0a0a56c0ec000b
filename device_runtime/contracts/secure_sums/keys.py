"""Keys, seals and key streams of secure sums; the one file here that imports ``cryptography``.

A key is of one purpose, job, group and pair of devices, and is used once: so no stream and no seal needs a nonce of its own.
"""

import secrets
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import msgspec

from fleetune.device_runtime.errors import WireError, lacking

KEY_BYTES = 32
SEAL_BYTES = 16
"""A sealed text is so much longer."""
_PURPOSE = "fleetune secure sums 1"
_SEAL, _PAIR, _SELF = "seal", "pair mask", "own mask"
_NONCE = bytes(12)


class Scope(msgspec.Struct, frozen=True):
    """Where a key is good: nowhere else."""

    job: str
    group: str
    """Devices that are summed together, another name for each attempt of each round."""


def need_cryptography() -> None:
    """Raise ConfigError that says what to install, if ``cryptography`` is not there."""
    try:
        import cryptography  # noqa: F401 (asked for before anything depends on it)
    except ImportError as exc:
        raise lacking("a secure sum", "cryptography", "trust") from exc


def new_secret() -> bytes:
    """Make an X25519 private key, from the operating system."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.generate().private_bytes_raw()


def new_seed() -> bytes:
    """Make a seed, from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def public_of(secret: bytes) -> bytes:
    """Return the public key of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def seal(text: bytes, secret: bytes, public: bytes, scope: Scope, *, sender: str, receiver: str) -> bytes:
    """Encrypt and authenticate for one device, once in a scope; WireError as :func:`agree`."""
    return _cipher(secret, public, scope, sender, receiver).encrypt(_NONCE, text, None)  # type: ignore[no-any-return]


def unseal(sealed: bytes, secret: bytes, public: bytes, scope: Scope, *, sender: str, receiver: str) -> bytes:
    """Decrypt what ``sender`` sealed; WireError if it is not its, not for this receiver, or of another scope."""
    from cryptography.exceptions import InvalidTag

    try:
        return _cipher(secret, public, scope, sender, receiver).decrypt(_NONCE, sealed, None)  # type: ignore[no-any-return]
    except InvalidTag as exc:
        raise WireError(f"what {sender!r} sealed for {receiver!r} is damaged, or not its") from exc


def pair_stream(
    secret: bytes, public: bytes, scope: Scope, devices: tuple[str, str]
) -> Callable[[int], bytes]:
    """Key stream that two devices share; ``devices`` in either order. WireError as :func:`agree`."""
    return _stream(_derived(agree(secret, public), scope, _PAIR, *sorted(devices)))


def own_stream(seed: bytes, scope: Scope, device: str) -> Callable[[int], bytes]:
    """Key stream of one device's seed."""
    return _stream(_derived(seed, scope, _SELF, device))


def digest_of_seed(seed: bytes) -> bytes:
    """Return what tells a seed of 32 random bytes again, and nothing of it."""
    return sha256(_PURPOSE.encode() + b" seed\0" + seed).digest()


def agree(secret: bytes, public: bytes) -> bytes:
    """X25519; WireError for a public key of another length or of small order, with which nothing would be secret."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import (
        X25519PrivateKey,
        X25519PublicKey,
    )

    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as exc:
        raise WireError("a public key of another length or of small order") from exc


def key_problem(public: bytes) -> str:
    """Say what is wrong with a public key; empty if others can agree with it."""
    try:
        agree(new_secret(), public)
    except WireError as exc:
        return str(exc)
    return ""


def _cipher(secret: bytes, public: bytes, scope: Scope, sender: str, receiver: str) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(_derived(agree(secret, public), scope, _SEAL, sender, receiver))


def _derived(secret: bytes, scope: Scope, *purpose: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    info = msgspec.msgpack.encode((_PURPOSE, purpose, scope.job, scope.group))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=info).derive(secret)


def _stream(key: bytes) -> Callable[[int], bytes]:
    """ChaCha20: quick without instructions for AES, which a Raspberry Pi 4 lacks."""
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

    encryptor = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda count: encryptor.update(bytes(count))
