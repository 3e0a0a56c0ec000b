"""Keys that sign what an aggregator says, and those that a device trusts: Ed25519, in PEM files; ``cryptography`` alone computes.

It is loaded when a file is read or written, and not before.
"""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec

from fleetune.device_runtime.contracts.seal import KEY_ID_BYTES, Seal, Stamp, seal
from fleetune.device_runtime.contracts.secure_sums.vouching import (
    Authorities,
    Voucher,
    open_authorities,
    open_voucher,
)
from fleetune.device_runtime.errors import ConfigError, choices, lacking
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.tls import KEY_PASSWORD
from fleetune.device_runtime.options import Option

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NO_AUTHORITY = "none"
FILE_BYTES_MAX = 64 * 1024
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_PUBLIC = b"PUBLIC KEY"
_HOW = "openssl genpkey -algorithm ed25519 makes one"


class Signing(msgspec.Struct, frozen=True, kw_only=True):
    """What an aggregator signs with."""

    sign_key: Annotated[
        str,
        Option(
            "private key (Ed25519, PEM) that signs what devices are told; none without it", metavar="FILE"
        ),
    ] = ""


class Trust(msgspec.Struct, frozen=True, kw_only=True):
    """Whom a device takes work from."""

    trust: Annotated[
        str,
        Option(
            "public keys (Ed25519, PEM, one or more): nothing is taken from an aggregator that none of them signed",
            metavar="FILE",
        ),
    ] = ""
    mask_authority: Annotated[
        str,
        Option(
            "authorities (PEM) of which one must have signed the certificate of each device that this one masks with; by default "
            "--ca-file, where that signed this device's own; none: it masks with any",
            metavar="FILE",
        ),
    ] = ""


class Signer:
    """Seals what one start of an aggregator says; each message has a higher number than the one before."""

    def __init__(self, key: "Ed25519PrivateKey", *, start: int) -> None:
        """Prepare; ``start`` counts the starts of the job, from 1, and is kept before anything is said."""
        self.key_id = key_id_of(key.public_key())
        self._key, self._start, self._number = key, start, 0

    @property
    def name(self) -> str:
        """How people tell the key from others."""
        return self.key_id.hex()

    def seal(self, topic: str, payload: bytes) -> bytes:
        """Return an encoded message, signed for ``topic``."""
        stamp = Stamp(self._start, self._number)
        self._number += 1
        return seal(topic, payload, key_id=self.key_id, stamp=stamp, sign=self._key.sign)


class Trusted:
    """The public keys that a device trusts; none is not possible."""

    def __init__(self, keys: Iterable["Ed25519PublicKey"]) -> None:
        from cryptography.exceptions import InvalidSignature

        self._keys = {key_id_of(key): key for key in keys}
        self._wrong = InvalidSignature

    @property
    def names(self) -> str:
        """The keys, as people tell them from others."""
        return choices(key_id.hex() for key_id in self._keys)

    def knows(self, key_id: bytes) -> bool:
        """Whether a key of this id is among them."""
        return key_id in self._keys

    def verify(self, seal: Seal) -> bool:
        """Whether the key that a seal names is among them and did sign."""
        return self.did_sign(seal.key_id, seal.signature, seal.covered)

    def did_sign(self, key_id: bytes, signature: bytes, covered: bytes) -> bool:
        """Whether the key of that id is among them and made this signature of ``covered``."""
        key = self._keys.get(key_id)
        if key is None:
            return False
        try:
            key.verify(signature, covered)
        except self._wrong:
            return False
        return True


def read_private(path: Path | str) -> "Ed25519PrivateKey":
    """Read an aggregator's key: PKCS8 PEM, Ed25519, not encrypted, readable by no other user of the machine.

    Raises:
        ConfigError: it is not there, not such a key, or others may read it.
    """
    library, content = _library(), _content(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        key = library.load_pem_private_key(content, None)
    except TypeError as exc:
        raise ConfigError(f"{path}: the key is encrypted; give it without a password") from exc
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"{path}: no private key in PEM; {_HOW}") from exc
    if Path(path).stat().st_mode & 0o007:
        raise ConfigError(f"{path}: other users of this machine may use this key: chmod 600 {path}")
    if not isinstance(key, Ed25519PrivateKey):
        raise _other_sort(path, key, "Ed25519PrivateKey")
    return key


def read_public(path: Path | str) -> list["Ed25519PublicKey"]:
    """Read the keys that a device trusts: one or more SubjectPublicKeyInfo PEM blocks, Ed25519.

    Raises:
        ConfigError: the file is not there, has no key, has one of another sort, or a private one.
    """
    library, content = _library(), _content(path)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    blocks = [(found[1], found[0]) for found in _BLOCK.finditer(content)]
    if strange := [kind.decode() for kind, _ in blocks if kind != _PUBLIC]:
        raise ConfigError(f"{path}: holds a {strange[0].lower()}; expected public keys alone, in PEM")
    if not blocks:
        raise ConfigError(f"{path}: no public key in PEM")
    try:
        keys = [library.load_pem_public_key(block) for _, block in blocks]
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ConfigError(f"{path}: a public key in it is damaged") from exc
    if strange_keys := [key for key in keys if not isinstance(key, Ed25519PublicKey)]:
        raise _other_sort(path, strange_keys[0], "Ed25519PublicKey")
    return keys


def trusted_of(trust: Trust) -> Trusted | None:
    """Open the keys that a device trusts; None if it is given none. ConfigError as :func:`read_public`."""
    return Trusted(read_public(trust.trust)) if trust.trust else None


class Vouching(NamedTuple):
    """Who vouches for a device's keys in sums under masks, and who must for others'."""

    voucher: Voucher | None = None
    authorities: Authorities | None = None
    where: str = ""
    """File of the authorities."""


def vouching_of(reach: Reach, trust: Trust, *, device_id: str) -> Vouching:
    """Open what vouches for a device's keys, and the authorities that must for others'.

    Raises:
        ConfigError: a file cannot be read or used, or authorities are named and ``cryptography`` is missing.
    """
    named = trust.mask_authority
    if not (is_named := named not in ("", NO_AUTHORITY)) and (not reach.cert or not _has_library()):
        return Vouching()
    voucher = _voucher(reach, device_id) if reach.cert else None
    if is_named:
        return Vouching(voucher, read_authorities(named), named)
    if named == NO_AUTHORITY or voucher is None or not reach.ca_file:
        return Vouching(voucher)
    authorities = read_authorities(reach.ca_file)
    is_of_them = not authorities.problem(voucher.certificate)
    return Vouching(voucher, authorities, reach.ca_file) if is_of_them else Vouching(voucher)


def read_authorities(path: Path | str) -> Authorities:
    """Read the authorities of devices' certificates, PEM.

    Raises:
        ConfigError: it cannot be read, holds none, or ``cryptography`` is missing.
    """
    return open_authorities(_content(path), str(path))


def _voucher(reach: Reach, device_id: str) -> Voucher | None:
    password = os.environ.get(KEY_PASSWORD, "").encode() or None
    key = _content(reach.key or reach.cert)
    return open_voucher(_content(reach.cert), key, password, device_id=device_id)


def write_key_pair(private: Path | str, public: Path | str) -> None:
    """Make an aggregator's key, readable by its owner alone, and the public one for devices; nothing is written over.

    Raises:
        ConfigError: one of the files is there.
        OSError: one cannot be written.
    """
    library = _library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pkcs8 = key.private_bytes(library.Encoding.PEM, library.PrivateFormat.PKCS8, library.NoEncryption())
    info = public_pem(key.public_key())
    _write_new(Path(private), pkcs8, mode=0o600)
    try:
        _write_new(Path(public), info, mode=0o644)
    except BaseException:
        Path(private).unlink()
        raise


def public_pem(key: "Ed25519PublicKey") -> bytes:
    """A public key as a PEM block, SubjectPublicKeyInfo."""
    library = _library()
    return bytes(key.public_bytes(library.Encoding.PEM, library.PublicFormat.SubjectPublicKeyInfo))


def key_id_of(key: "Ed25519PublicKey") -> bytes:
    """First bytes of SHA-256 of the raw public key."""
    return sha256(key.public_bytes_raw()).digest()[:KEY_ID_BYTES]


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as exc:
        raise ConfigError(f"{path}: is there already; a key is not written over") from exc
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


def _content(path: Path | str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read as a key: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise ConfigError(f"{path}: more than {FILE_BYTES_MAX} bytes; no file of keys")
    return content


def _other_sort(path: Path | str, key: object, wanted: str) -> ConfigError:
    return ConfigError(f"{path}: a key of another sort, {type(key).__name__.lstrip('_')}; expected {wanted}")


def _library() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as exc:
        raise lacking("a signed job", "cryptography", "trust") from exc
    return serialization


def _has_library() -> bool:
    return find_spec("cryptography") is not None
