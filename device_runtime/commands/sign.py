"""``fleetune sign``: whose artifact it is, told by a signature of its manifest, which fixes every other file."""

from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.seal import KEY_ID_BYTES, SIGNATURE_BYTES
from fleetune.device_runtime.errors import ArtifactError
from fleetune.device_runtime.network.signing import Trusted, key_id_of, read_private

SIGNATURE = "manifest.sig"
"""In the artifact's folder: the key's id, then the signature. No manifest names it."""
PURPOSE = b"fleetune v1: an artifact\n"
_SIZE = KEY_ID_BYTES + SIGNATURE_BYTES


class SignReport(msgspec.Struct, frozen=True, kw_only=True):
    """``artifact`` is the SHA-256 of the manifest, ``key`` the id of the key that signed."""

    artifact: str
    key: str


def sign(artifact_dir: Path | str, *, sign_key: Path | str) -> SignReport:
    """Check every file of an artifact, and sign its manifest; a signature that was there is replaced.

    Args:
        artifact_dir: folder made by ``fleetune export``.
        sign_key: private key, Ed25519 in PEM.

    Raises:
        ArtifactError: the artifact is damaged.
        ConfigError: no such key, or one that others may read.
        OSError: the signature cannot be written.
    """
    key = read_private(sign_key)
    artifact = open_artifact(artifact_dir)
    key_id = key_id_of(key.public_key())
    write_atomically(artifact.folder / SIGNATURE, key_id + key.sign(_covered(artifact)))
    return SignReport(artifact=artifact.digest, key=key_id.hex())


def check_signed(artifact: Artifact, trusted: Trusted) -> None:
    """Raise ArtifactError unless one of the trusted keys has signed the artifact."""
    said = _read(artifact.folder)
    key_id, signature = said[:KEY_ID_BYTES], said[KEY_ID_BYTES:]
    expected = f"{artifact.folder}: expected an artifact that key {trusted.names} signed"
    if not said:
        raise ArtifactError(f"{expected}; nobody did (fleetune sign)")
    if len(said) != _SIZE:
        raise ArtifactError(f"{expected}; {SIGNATURE} is damaged")
    if not trusted.did_sign(key_id, signature, _covered(artifact)):
        raise ArtifactError(f"{expected}; {SIGNATURE} is of key {key_id.hex()}, or of another artifact")


def _read(folder: Path) -> bytes:
    try:
        with (folder / SIGNATURE).open("rb") as file:
            return file.read(_SIZE + 1)
    except FileNotFoundError:
        return b""
    except OSError as exc:
        raise ArtifactError(f"{folder / SIGNATURE}: cannot be read: {exc.strerror}") from exc


def _covered(artifact: Artifact) -> bytes:
    return PURPOSE + bytes.fromhex(artifact.digest)
