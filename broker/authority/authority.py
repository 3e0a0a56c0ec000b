"""``fleetune authority``: a folder with an authority's keys, and what is done with them.

Two certificates sign: ``ca.crt`` devices and servers, ``operators.crt`` the aggregator alone. So a listener can take the
one and not the other, and no device can connect under a client id of the aggregator.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from fleetune.broker.authority.certificates import (
    BACKDATED,
    Issuer,
    check_hosts,
    fingerprint,
    issue,
    now,
    numbers_of,
    read_request,
    revocation_list,
    self_signed,
)
from fleetune.broker.authority.index import Entry, Index
from fleetune.broker.authority.places import (
    AGGREGATOR,
    DEVICES,
    INDEX,
    OPERATORS,
    REVOKED,
    SERVER,
    SIGNING,
    SIGNING_PUBLIC,
    certificate_of,
    check_authority,
    key_of,
)
from fleetune.device_runtime.arrays import PRIVATE, sync, write_atomically
from fleetune.device_runtime.contracts.malformed import MALFORMED
from fleetune.device_runtime.errors import ConfigError, StateError, choices
from fleetune.device_runtime.files import doing, replacing
from fleetune.device_runtime.network.keys import Key, kept_key, key_pem, new_key, read_key
from fleetune.device_runtime.network.signing import write_key_pair

PASSWORD = "FLEETUNE_AUTHORITY_PASSWORD"
"""If set, the keys that sign certificates are encrypted with it."""
DAYS_MAX = 3650
RESERVED = "fleetune-"
"""Client ids of aggregators begin with it."""


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate that was made, or found."""

    name: str
    serial: str
    valid_until: str
    folder: str
    """Where it lies, with what its owner needs beside it."""
    is_new: bool


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate as it stands."""

    name: str
    kind: str
    serial: str
    valid_until: str
    state: str
    """valid, replaced (by a newer one; it still opens doors), expired or revoked."""


class Revoked(msgspec.Struct, frozen=True, kw_only=True):
    """What was revoked."""

    name: str
    serials: list[str]
    revocation_list: str


def init(
    folder: Path | str, *, name: str = "fleetune", hosts: Sequence[str] = (), days: int = DAYS_MAX
) -> Path:
    """Make an authority: its keys and certificates, the aggregator's, the pair that signs jobs; with ``hosts`` the server's.

    Either the whole folder is there afterwards, or nothing.

    Raises:
        ConfigError: something is there already, a bad name, host or number of days.
        StateError: the folder cannot be written.
    """
    target = Path(folder)
    _check_days(days)
    if hosts:
        check_hosts(hosts)
    if not 0 < len(name) <= 40 or not name.isprintable():
        raise ConfigError(f"--name {name[:40]!r}: expected 1 to 40 printable characters")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ConfigError(f"{target}: not empty; an authority wants a folder of its own")
    with doing("written", target), replacing(target) as part:
        part.chmod(0o700)
        for issuer, said in ((DEVICES, "devices"), (OPERATORS, "operators")):
            key = new_key()
            write_atomically(key_of(part, issuer), key_pem(key, password=_password()), mode=PRIVATE)
            made = self_signed(f"{name} {said}", key, days=days)
            write_atomically(certificate_of(part, issuer), _pem(made))
        write_key_pair(part / SIGNING, part / SIGNING_PUBLIC)
        aggregator(part)
        if hosts:
            server(part, hosts=hosts)
    sync(target.resolve().parent)
    return target


def server(folder: Path | str, *, hosts: Sequence[str], days: int = 825) -> Signed:
    """Make the MQTT server's certificate for its names and addresses; its key stays if there is one.

    Raises:
        ConfigError: no authority there, no host or a bad one, a bad number of days.
        StateError: the folder is damaged or cannot be written.
    """
    check_hosts(hosts)
    return _own(Path(folder), SERVER, hosts[0], hosts=hosts, days=days)


def aggregator(folder: Path | str, *, days: int = 825) -> Signed:
    """Make the aggregator's certificate, whose name is ``aggregator``; its key stays unless it was revoked.

    Raises:
        ConfigError: no authority there, or a bad number of days.
        StateError: the folder is damaged or cannot be written.
    """
    return _own(Path(folder), AGGREGATOR, AGGREGATOR, days=days)


def sign(
    folder: Path | str,
    *,
    request: Path | str,
    days: int = 365,
    renew: bool = False,
    out: Path | str | None = None,
) -> Signed:
    """Sign a device's request, and put its certificate with ``ca.crt`` and ``signing.pub`` into a folder for it.

    The same request again gives the same certificate, so a sign that was killed is done by another one.

    Args:
        folder: the authority's.
        request: file that ``fleetune enrol`` made; its name is all that is taken over.
        days: how long the certificate holds.
        renew: the name had a certificate before, of this key or another.
        out: folder for the device; by default ``devices/NAME`` in the authority's.

    Raises:
        ConfigError: a request that cannot be signed, with the reason.
        StateError: the folder is damaged or cannot be written.
    """
    folder = Path(folder)
    _check_days(days)
    asked = read_request(Path(request))
    if asked.name == AGGREGATOR or asked.name.startswith(RESERVED):
        raise ConfigError(
            f"{request}: the name {asked.name!r} is the aggregator's; a device needs another one"
        )
    with _opened(folder) as index:
        with index.alone():
            found = _signable(index, asked.name, fingerprint(asked.public_key), renew=renew)
            entry = found or _issued(
                index, _issuer(folder, DEVICES), "device", asked.name, asked.public_key, days=days
            )
        bundle = Path(out) if out else folder / "devices" / asked.name
        with doing("written", bundle):
            bundle.mkdir(parents=True, exist_ok=True)
            write_atomically(bundle / f"{asked.name}.crt", entry.pem.encode())
            for path in (certificate_of(folder, DEVICES), folder / SIGNING_PUBLIC):
                write_atomically(bundle / path.name, path.read_bytes())
    return _signed(entry, bundle, is_new=found is None)


def listed(folder: Path | str) -> list[Listed]:
    """List every certificate that was made, the oldest first."""
    at = int(now().timestamp())
    with _opened(Path(folder)) as index:
        entries = index.entries()
    newest = {(entry.kind, entry.name): entry.serial for entry in entries if not entry.revoked}
    return [
        Listed(
            name=entry.name,
            kind=entry.kind,
            serial=entry.serial,
            valid_until=_date(entry.ends),
            state=_state(entry, at, is_newest=newest.get((entry.kind, entry.name)) == entry.serial),
        )
        for entry in entries
    ]


def revoke(folder: Path | str, *, name: str, replaced: bool = False) -> Revoked:
    """Revoke all certificates of a device, or the aggregator's; with ``replaced`` only those that a newer one replaces.

    Raises:
        ConfigError: nobody has this name.
        StateError: the folder is damaged or cannot be written.
    """
    folder, at = Path(folder), int(now().timestamp())
    with _opened(folder) as index:
        with index.alone():
            entries = [one for one in index.entries() if one.kind != SERVER]
            own = [one for one in entries if one.name == name]
            if not own:
                raise ConfigError(
                    f"{folder}: no certificate of {name!r}; have: {choices({e.name for e in entries})}"
                )
            standing = [one for one in own if not one.revoked]
            gone = standing[:-1] if replaced else standing
            for one in gone:
                index.revoke(one.serial, at=at)
            if gone:
                index.begin_list(at=_listed_from())
        _settle(folder, index)
    return Revoked(name=name, serials=[one.serial for one in gone], revocation_list=str(folder / REVOKED))


@contextmanager
def _opened(folder: Path) -> Iterator[Index]:
    """The index of an authority, its list of revoked ones brought up to date if a revocation was killed in between."""
    check_authority(folder)
    with Index(folder / INDEX) as index:
        _settle(folder, index)
        yield index


def _settle(folder: Path, index: Index) -> None:
    """Write the lists of both issuers, in one file, unless it is the newest; two processes at once do it one by one."""
    with index.alone(), doing("written", folder / REVOKED):
        if index.newest_list()[0] == 0:
            index.begin_list(at=_listed_from())
        number, at = index.newest_list()
        path = folder / REVOKED
        if path.exists() and numbers_of(path.read_bytes()) == [number, number]:
            return
        entries = [one for one in index.entries() if one.revoked]
        lists = [_list(folder, issuer, entries, number=number, at=at) for issuer in (DEVICES, OPERATORS)]
        write_atomically(path, b"".join(lists))


def _list(folder: Path, issuer: str, entries: Sequence[Entry], *, number: int, at: int) -> bytes:
    signs = _issuer(folder, issuer)
    rows = [
        (int(one.serial, 16), _when(one.revoked))
        for one in entries
        if (one.kind == AGGREGATOR) == (issuer == OPERATORS)
    ]
    return revocation_list(signs, rows, number=number, at=_when(at))


def _listed_from() -> int:
    """When a list begins to hold: a server whose clock is behind would take nobody in until then."""
    return int((now() - BACKDATED).timestamp())


def _signable(index: Index, name: str, key: str, *, renew: bool) -> Entry | None:
    """The certificate that a request has already; None if it is to get one; ConfigError if not."""
    entries = index.entries(kind="device")
    of_key = [one for one in entries if one.key == key]
    if any(one.revoked for one in of_key):
        raise ConfigError(f"{name}: a certificate of this key was revoked; make a new key (fleetune enrol)")
    if strange := [one.name for one in of_key if one.name != name]:
        raise ConfigError(f"{name}: the key is that of {strange[0]!r}; every device makes its own")
    own = [one for one in entries if one.name == name]
    if not own or renew:
        return None
    last, at = own[-1], int(now().timestamp())
    if last.key == key and last.ends > at:
        return last
    state = _state(last, at, is_newest=True)
    raise ConfigError(
        f"{name}: it has a certificate of {'this' if last.key == key else 'another'} key, {state}, until {_date(last.ends)}; "
        "--renew signs a new one"
    )


def _issued(
    index: Index, issuer: Issuer, kind: str, name: str, public_key: object, *, days: int, hosts: Sequence[str] = ()
) -> Entry:  # fmt: skip
    made = issue(issuer, name, public_key, days=days, hosts=hosts)  # type: ignore[arg-type]
    entry = Entry(
        serial=f"{made.serial_number:x}",
        kind=kind,
        name=name,
        key=fingerprint(made.public_key()),  # type: ignore[arg-type]
        begins=int(made.not_valid_before_utc.timestamp()),
        ends=int(made.not_valid_after_utc.timestamp()),
        pem=_pem(made).decode(),
    )
    index.add(entry)
    return entry


def _own(folder: Path, kind: str, name: str, *, days: int, hosts: Sequence[str] = ()) -> Signed:
    """Make a certificate of a key that lies with the authority."""
    _check_days(days)
    with _opened(folder) as index:
        key = kept_key(key_of(folder, kind))
        if fingerprint(key.public_key()) in {one.key for one in index.entries(kind=kind) if one.revoked}:
            key_of(folder, kind).unlink()
            key = kept_key(key_of(folder, kind))
        issuer = _issuer(folder, OPERATORS if kind == AGGREGATOR else DEVICES)
        with index.alone():
            entry = _issued(index, issuer, kind, name, key.public_key(), days=days, hosts=hosts)
        with doing("written", folder):
            write_atomically(certificate_of(folder, kind), entry.pem.encode())
    return _signed(entry, folder, is_new=True)


def _issuer(folder: Path, which: str) -> Issuer:
    path, key_path = certificate_of(folder, which), key_of(folder, which)
    with doing("read", folder):
        content, key_content = path.read_bytes(), key_path.read_bytes()
    try:
        certificate = x509.load_pem_x509_certificate(content)
    except MALFORMED as exc:
        raise StateError(f"{path}: damaged: not a certificate in PEM") from exc
    key = _key(key_content, key_path)
    if certificate.public_key() != key.public_key():
        raise StateError(f"{key_path}: not the key of {path.name}")
    return Issuer(certificate, key)


def _key(content: bytes, path: Path) -> Key:
    is_locked = b"ENCRYPTED" in content
    if is_locked and not _password():
        raise ConfigError(f"{path}: encrypted; its password belongs into {PASSWORD}")
    return read_key(content, path, password=_password() if is_locked else None)


def _password() -> bytes | None:
    return os.environ.get(PASSWORD, "").encode() or None


def _check_days(days: int) -> None:
    if not 1 <= days <= DAYS_MAX:
        raise ConfigError(f"--days {days}: expected 1 to {DAYS_MAX}")


def _state(entry: Entry, at: int, *, is_newest: bool) -> str:
    if entry.revoked:
        return "revoked"
    if entry.ends <= at:
        return "expired"
    return "valid" if is_newest else "replaced"


def _signed(entry: Entry, folder: Path, *, is_new: bool) -> Signed:
    return Signed(
        name=entry.name,
        serial=entry.serial,
        valid_until=_date(entry.ends),
        folder=str(folder),
        is_new=is_new,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _when(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


def _date(seconds: int) -> str:
    return f"{_when(seconds):%Y-%m-%d}"
