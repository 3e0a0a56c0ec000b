"""What the certificates of an authority say, and what a request must say to get one; the only file here that makes any."""

import ipaddress
import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.contracts.malformed import MALFORMED
from fleetune.device_runtime.errors import ConfigError, one_line
from fleetune.device_runtime.network.keys import Key, common_name

REQUEST_BYTES_MAX = 64 * 1024
PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

BACKDATED = timedelta(hours=1)
"""Clocks are behind: what is made begins to hold so long ago."""
_RSA_BITS = (2048, 4096)
_CURVES = ("secp256r1", "secp384r1")
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*")
_NAME_CHARS_MAX = 64
"""Of a common name, RFC 5280."""


class Issuer(NamedTuple):
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: Key


class Request(NamedTuple):
    """What a certificate request asks for; nothing else of it is taken over."""

    name: str
    public_key: PublicKey


def now() -> datetime:
    """Return the time in whole seconds, UTC, as certificates have it."""
    return datetime.now(timezone.utc).replace(microsecond=0)


def self_signed(name: str, key: Key, *, days: int) -> x509.Certificate:
    """Make the certificate of an authority; it may sign certificates and revocation lists, and no other authority."""
    subject, ends = common_name(name), now() + timedelta(days=days)
    builder = _builder(subject, key.public_key(), ends=ends).issuer_name(subject)
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def issue(
    issuer: Issuer, name: str, public_key: PublicKey, *, days: int, hosts: Sequence[str] = ()
) -> x509.Certificate:
    """Make a certificate for ``name``: of a server that is known as ``hosts``, or of a client if there are none.

    It ends with the authority at the latest.

    Raises:
        ConfigError: the authority has ended.
    """
    ends = issuer.certificate.not_valid_after_utc
    if ends <= now():
        raise ConfigError(f"the authority's own certificate ended on {ends:%Y-%m-%d}: make a new authority")
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = (
        _builder(common_name(name), public_key, ends=min(ends, now() + timedelta(days=days)))
        .issuer_name(issuer.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
        )
    )
    if hosts:
        builder = builder.add_extension(
            x509.SubjectAlternativeName([_alternative(h) for h in hosts]), critical=False
        )
    return builder.sign(issuer.key, hashes.SHA256())


def revocation_list(
    issuer: Issuer, revoked: Iterable[tuple[int, datetime]], *, number: int, at: datetime
) -> bytes:
    """Make the list of revoked serial numbers, PEM. It holds as long as the authority: one that ends locks everybody out."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(at)
        .next_update(issuer.certificate.not_valid_after_utc)
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.key.public_key()), critical=False
        )
    )
    for serial, when in revoked:
        row = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
        builder = builder.add_revoked_certificate(row)
    return builder.sign(issuer.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def numbers_of(lists: bytes) -> list[int]:
    """Return the numbers of the revocation lists in a file; empty if it is damaged."""
    mark = b"-----BEGIN X509 CRL-----"
    try:
        found = [x509.load_pem_x509_crl(mark + part) for part in lists.split(mark)[1:]]
        return [one.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number for one in found]
    except (*MALFORMED, x509.ExtensionNotFound):
        return []


def read_request(path: Path) -> Request:
    """Read a certificate request, and check what it says.

    Raises:
        ConfigError: not a request, its signature is not its key's, its name is none, or its key is too weak.
    """
    try:
        with path.open("rb") as file:
            content = file.read(REQUEST_BYTES_MAX + 1)
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(content) > REQUEST_BYTES_MAX:
        raise ConfigError(f"{path}: longer than {REQUEST_BYTES_MAX} bytes: no certificate request")
    try:
        return _checked(content)
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    except (*MALFORMED, InvalidSignature) as exc:
        raise ConfigError(f"{path}: not a certificate request in PEM, or a damaged one") from exc


def fingerprint(public_key: PublicKey) -> str:
    """Return SHA-256 of a public key (SubjectPublicKeyInfo), in hexadecimal."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    digest = hashes.Hash(hashes.SHA256())
    digest.update(public_key.public_bytes(serialization.Encoding.DER, form))
    return digest.finalize().hex()


def check_hosts(hosts: Sequence[str]) -> None:
    """Raise ConfigError unless each is a DNS name or an IP address, and there is one."""
    if not hosts:
        raise ConfigError("a server needs a name: give --host, once for each name or IP address of it")
    strange = [h for h in hosts if not _is_address(h) and not (_HOST.fullmatch(h) and len(h) <= 253)]
    if strange:
        raise ConfigError(
            f"--host {one_line(strange[0], length_max=80)!r}: expected a DNS name or an IP address"
        )
    if len(hosts[0]) > _NAME_CHARS_MAX:
        raise ConfigError(
            f"--host {hosts[0][:20]}…: give first a name of at most {_NAME_CHARS_MAX} characters"
        )


def _checked(content: bytes) -> Request:
    request = x509.load_pem_x509_csr(content)
    if not request.is_signature_valid:
        raise ConfigError("its signature is not that of its own key")
    names = [str(one.value) for one in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1:
        raise ConfigError(f"{len(names)} common names (CN) in its subject; expected one")
    if len(names[0]) > _NAME_CHARS_MAX:
        raise ConfigError(f"a name of {len(names[0])} characters; at most {_NAME_CHARS_MAX}")
    key = request.public_key()
    if isinstance(key, rsa.RSAPublicKey) and _RSA_BITS[0] <= key.key_size <= _RSA_BITS[1]:
        return Request(check_name("device", names[0]), key)
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in _CURVES:
        return Request(check_name("device", names[0]), key)
    raise ConfigError("its key must be ECDSA on P-256 or P-384, or RSA of 2048 to 4096 bits")


def _builder(subject: x509.Name, public_key: PublicKey, *, ends: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - BACKDATED)
        .not_valid_after(ends)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if _is_address(host) else x509.DNSName(host)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
