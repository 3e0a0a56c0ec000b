"""Where an authority has what: read by who configures a server, without the library that makes it."""

from pathlib import Path

from fleetune.device_runtime.errors import ConfigError

DEVICES, OPERATORS = "ca", "operators"
"""Whom the two certificates that sign are for."""
SERVER, AGGREGATOR = "server", "aggregator"
SIGNING, SIGNING_PUBLIC = "signing.key", "signing.pub"
"""The pair that signs jobs and offers, Ed25519."""
REVOKED = "revoked.pem"
"""Lists of revoked certificates, of both signers."""
INDEX = "authority.sqlite"


def certificate_of(folder: Path, name: str) -> Path:
    """Return where the certificate of a signer, the server or the aggregator is."""
    return folder / f"{name}.crt"


def key_of(folder: Path, name: str) -> Path:
    """Return where its private key is."""
    return folder / f"{name}.key"


def check_authority(folder: Path) -> None:
    """Raise ConfigError if there is no authority in a folder."""
    if not certificate_of(folder, DEVICES).is_file():
        raise ConfigError(f"{folder}: no authority here; fleetune authority init {folder} makes one")
