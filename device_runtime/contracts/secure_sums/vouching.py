"""Who vouches for the keys of a sum under masks: a device's certificate signs them, and an authority signed that.

So neither the aggregator nor the MQTT server can put keys of its own in a device's place. Signed are the job, the group, which
is another for each attempt of each round, and the device; so keys of an earlier attempt, whose secrets may have been told, fit
no later one.

Source: Bonawitz et al., arXiv 1611.04482, figure 4 (its lines for active adversaries: the signature of round 0 and its check in
round 1). That the signing key is the certificate's, and that a group is named before keys are made, is ours. Like :mod:`keys`
this imports ``cryptography`` when it is first needed.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import msgspec

from fleetune.device_runtime.contracts.fields import CERTIFICATE_BYTES_MAX
from fleetune.device_runtime.contracts.mask_messages import MaskKeys, MaskPeer
from fleetune.device_runtime.contracts.secure_sums.keys import Scope, need_cryptography
from fleetune.device_runtime.errors import ConfigError, one_line

PURPOSE = b"fleetune secure sums: keys of one device in one group\n"


class Vouched(NamedTuple):
    """What stands beside keys; blank where nobody vouches."""

    certificate: bytes = b""
    """X.509, DER."""
    signature: bytes = b""


class Voucher:
    """A device's certificate, and its private key: ECDSA, or RSA with PKCS1 v1.5, both over SHA-256."""

    def __init__(self, certificate: bytes, key: Any) -> None:
        self.certificate, self._key = certificate, key

    def vouch(self, scope: Scope, device_id: str, mask_key: bytes, share_key: bytes) -> Vouched:
        """Sign the keys of this device in one group."""
        said = _said(scope, device_id, mask_key, share_key)
        return Vouched(self.certificate, self._key.sign(said, *_how(self._key)))


class Authorities:
    """Those of which one must have signed a certificate."""

    def __init__(self, certificates: Sequence[Any]) -> None:
        self._certificates = certificates

    @property
    def pem(self) -> str:
        """Their certificates, PEM, and nothing else."""
        from cryptography.hazmat.primitives.serialization import Encoding

        return "".join(one.public_bytes(Encoding.PEM).decode() for one in self._certificates)

    def problem(self, certificate: bytes, now: datetime | None = None) -> str:
        """Say why a certificate (DER) is not one that they gave a device; empty if it is."""
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature
        from cryptography.x509.oid import ExtendedKeyUsageOID

        from fleetune.device_runtime.contracts.malformed import MALFORMED

        try:
            found = x509.load_der_x509_certificate(certificate)
            issuers = [one for one in self._certificates if one.subject == found.issuer]
            purposes = _purposes(found)
        except MALFORMED:
            return "its certificate is damaged"
        if not any(_is_issued_by(found, issuer, (InvalidSignature, *MALFORMED)) for issuer in issuers):
            return "no authority that this device trusts signed its certificate"
        if purposes and ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
            return "its certificate is no device's: it is for something else"
        now = now or datetime.now(timezone.utc)
        if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
            return f"its certificate holds from {found.not_valid_before_utc:%Y-%m-%d} to {found.not_valid_after_utc:%Y-%m-%d}"
        return ""


def problem_of_peer(scope: Scope, peer: MaskPeer | MaskKeys) -> str:
    """Say why keys are not those that the holder of the certificate beside them signed for this group; empty if they are."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    from fleetune.device_runtime.contracts.malformed import MALFORMED

    if not peer.certificate:
        return "no certificate is beside its keys"
    try:
        found = x509.load_der_x509_certificate(peer.certificate)
        names = _names_of(found)
        if names != [peer.device_id]:
            return f"its certificate is of {one_line(names[0] if names else '')!r}"
        key: Any = found.public_key()
        key.verify(peer.signature, _said(scope, peer.device_id, peer.mask_key, peer.share_key), *_how(key))
    except InvalidSignature:
        return "its certificate's key did not sign its keys for this group"
    except MALFORMED:
        return "its certificate is damaged, or of a kind of key that is not taken"
    return ""


def open_voucher(certificate: bytes, key: bytes, password: bytes | None, *, device_id: str) -> Voucher | None:
    """Make a device's voucher of its certificate and key, PEM; None where that is of another name, or a kind that cannot vouch.

    Args:
        certificate: whose first is taken.
        key: PKCS8, encrypted if there is a password.
        password: of the key.
        device_id: whose certificate it is to be; empty for anybody's.

    Raises:
        ConfigError: one of them is damaged, the password is wrong, or ``cryptography`` is missing.
    """
    need_cryptography()
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    try:
        found = x509.load_pem_x509_certificate(certificate)
        secret = serialization.load_pem_private_key(key, password)
    except Exception:  # noqa: BLE001 - whatever the library says might quote the key
        raise ConfigError(
            "masks: the certificate or its key is not PEM, or the key's password is wrong"
        ) from None
    der = found.public_bytes(serialization.Encoding.DER)
    is_kind = isinstance(secret, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey)
    is_own = not device_id or _names_of(found) == [device_id]
    fits = is_kind and is_own and len(der) <= CERTIFICATE_BYTES_MAX
    return Voucher(der, secret) if fits else None


def open_authorities(content: bytes, where: str) -> Authorities:
    """Read one or more certificates of authorities, PEM; ConfigError if there is none, or ``cryptography`` is missing."""
    need_cryptography()
    from cryptography import x509

    from fleetune.device_runtime.contracts.malformed import MALFORMED

    try:
        return Authorities(x509.load_pem_x509_certificates(content))
    except MALFORMED as exc:
        raise ConfigError(f"{where}: no certificate of an authority in PEM") from exc


def _said(scope: Scope, device_id: str, mask_key: bytes, share_key: bytes) -> bytes:
    return PURPOSE + msgspec.msgpack.encode((scope.job, scope.group, device_id, mask_key, share_key))


def _how(key: Any) -> tuple[Any, ...]:
    """How a key signs and verifies; TypeError for another kind."""
    from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256

    if isinstance(key, ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey):
        return (ec.ECDSA(SHA256()),)
    if isinstance(key, rsa.RSAPrivateKey | rsa.RSAPublicKey):
        return (padding.PKCS1v15(), SHA256())
    raise TypeError(f"a key of another kind: {type(key).__name__}")


def _names_of(found: Any) -> list[str]:
    from cryptography.x509.oid import NameOID

    return [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _is_issued_by(found: Any, issuer: Any, wrong: tuple[type[Exception], ...]) -> bool:
    try:
        found.verify_directly_issued_by(issuer)
    except wrong:
        return False
    return True


def _purposes(found: Any) -> Iterable[Any]:
    from cryptography import x509

    try:
        return [*found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value]
    except x509.ExtensionNotFound:
        return []
