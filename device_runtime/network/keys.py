"""A key of one's own and the request for its certificate: made by devices, server and aggregator alike; needs cryptography.

Keys are ECDSA on P-256: every TLS 1.2 stack takes it, those of boards and hardware modules too. Ed25519 in a certificate
wants RFC 8422, which many of them lack.
"""

from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fleetune.device_runtime.arrays import PRIVATE, write_atomically
from fleetune.device_runtime.contracts.malformed import MALFORMED
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import doing

Key = ec.EllipticCurvePrivateKey


def kept_key(path: Path) -> Key:
    """Return the key in a file, which is made, mode 0600, if there is none.

    Raises:
        StateError: it is damaged, encrypted, or of another kind, or cannot be written.
    """
    with doing("read", path):
        content = path.read_bytes() if path.exists() else b""
    if content:
        return read_key(content, path)
    key = new_key()
    with doing("written", path):
        write_atomically(path, key_pem(key), mode=PRIVATE)
    return key


def new_key() -> Key:
    """Make a key."""
    return ec.generate_private_key(ec.SECP256R1())


def read_key(content: bytes, path: Path, *, password: bytes | None = None) -> Key:
    """Return the key in a file's ``content``; StateError without a word of it, if there is none."""
    try:
        key = serialization.load_pem_private_key(content, password)
    except TypeError:
        told = "its password is not given" if password is None else "it has no password"
        raise StateError(f"{path}: {told}") from None
    except Exception:  # noqa: BLE001 - whatever the library says might quote the key
        raise StateError(
            f"{path}: not a private key in PEM" + (", or its password is wrong" if password else "")
        ) from None
    if not isinstance(key, Key):
        raise StateError(f"{path}: a key of another kind than ECDSA on P-256")
    return key


def key_pem(key: Key, *, password: bytes | None = None) -> bytes:
    """Return a key as PKCS8 PEM, encrypted if there is a password."""
    form = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, form)


def request_pem(name: str, key: Key) -> bytes:
    """Return a certificate request (PKCS10, PEM) for the common name ``name``, signed with its key."""
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name))
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def is_of_key(content: bytes, key: Key) -> bool:
    """Whether a request or a certificate, PEM, is of a key; False too if it is damaged."""
    load = x509.load_pem_x509_csr if b" REQUEST-----" in content else x509.load_pem_x509_certificate
    try:
        return bool(load(content).public_key() == key.public_key())
    except MALFORMED:
        return False


def common_name(name: str) -> x509.Name:
    """Return a subject that says a common name (CN) alone."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
