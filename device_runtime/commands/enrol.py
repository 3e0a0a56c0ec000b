"""``fleetune enrol``: a device makes its own key, and the request that an authority signs; the key never leaves."""

from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import doing


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has of its identity."""

    name: str
    key: str
    """File of the private key, mode 0600; it stays here."""
    request: str
    """File of the request; this goes to the authority."""
    certificate: str
    """Where the certificate belongs that comes back."""
    is_new: bool
    """Whether the key was made now."""
    is_signed: bool
    """Whether the certificate is here."""


def enrol(name: str, *, out: Path | str) -> Enrolment:
    """Make a device's key and certificate request in ``out``; what is there already stays, and is told.

    Args:
        name: the device's id, which the certificate will say (CN).
        out: folder, made for its owner alone if it is not there.

    Raises:
        ConfigError: no name that a device can have.
        StateError: a file there is damaged, or of another key or name, or cannot be written.
    """
    from fleetune.device_runtime.network.keys import is_of_key, kept_key, request_pem

    folder = Path(out)
    key_path, request_path, certificate_path = (
        folder / f"{check_name('device', name)}.{end}" for end in ("key", "csr", "crt")
    )
    with doing("made", folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    is_new = not key_path.exists()
    if is_new and (left := [p.name for p in (request_path, certificate_path) if p.exists()]):
        raise StateError(f"{folder}: {left[0]} is here without its key; move it away, or bring the key back")
    key = kept_key(key_path)
    if not request_path.exists():
        with doing("written", request_path):
            write_atomically(request_path, request_pem(name, key))
    for path in filter(Path.exists, (request_path, certificate_path)):
        with doing("read", path):
            content = path.read_bytes()
        if not is_of_key(content, key):
            raise StateError(f"{path}: damaged, or not of the key {key_path}; move it away")
    return Enrolment(
        name=name,
        key=str(key_path),
        request=str(request_path),
        certificate=str(certificate_path),
        is_new=is_new,
        is_signed=certificate_path.exists(),
    )
