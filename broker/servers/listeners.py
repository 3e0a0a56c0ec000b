"""Listeners of Mosquitto with TLS: what they show, whom they take, and under which client id."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fleetune.broker.authority.places import (
    DEVICES,
    OPERATORS,
    REVOKED,
    SERVER,
    certificate_of,
    check_authority,
    key_of,
)
from fleetune.device_runtime.arrays import PRIVATE, write_atomically
from fleetune.device_runtime.errors import ConfigError


class Tls(NamedTuple):
    """PEM files of the server; with ``client_ca`` every client must show a certificate of that authority.

    Without a password file the name in the certificate (CN) is the client's user name then.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None
    revoked: Path | None = None
    """Certificates of ``client_ca`` that are no longer taken (CRL)."""
    aggregator_ca: Path | None = None
    """Authority of the aggregator alone, which has a listener of its own then. On the devices' listener the client id
    is the certificate's name, so that none can throw another, or the aggregator, off the server."""


def of_authority(folder: Path) -> Tls:
    """Name the files of an authority that a server needs; ConfigError if there is none, or it has no server's certificate."""
    check_authority(folder)
    if not certificate_of(folder, SERVER).is_file():
        raise ConfigError(
            f"{folder}: no certificate of the server yet; fleetune authority server {folder} --host NAME"
        )
    return Tls(
        certificate=certificate_of(folder, SERVER),
        key=key_of(folder, SERVER),
        client_ca=certificate_of(folder, DEVICES),
        revoked=folder / REVOKED,
        aggregator_ca=certificate_of(folder, OPERATORS),
    )


def copied(tls: Tls, folder: Path) -> Tls:
    """Copy what the server reads beside its configuration: the authority's own folder stays shut."""
    folder.mkdir(mode=0o700, exist_ok=True)
    for path in filter(None, tls):
        mode = PRIVATE if path == tls.key else 0o644
        write_atomically(folder / path.name, path.read_bytes(), mode=mode)
    places = {name: path and folder / path.name for name, path in tls._asdict().items()}
    return tls._replace(**places)


def problems_of(
    tls: Tls | None, *, websockets_port: int | None, aggregator_port: int | None, has_passwords: bool
) -> Iterator[str]:
    """Say what does not go together."""
    if aggregator_port and not (tls and tls.aggregator_ca):
        yield "--aggregator-port needs the aggregator's own authority"
    if tls is None or not (tls.revoked or tls.aggregator_ca):
        return
    if not tls.client_ca:
        yield "a list of revoked certificates, or an aggregator's authority, needs one of the clients"
    if has_passwords and tls.aggregator_ca:
        yield "with an aggregator's authority certificates are the logins; give no password file"
    if websockets_port:
        yield "Mosquitto's WebSockets know no list of revoked certificates and bind no client ids; leave them out"


def listener(port: int, *, address: str, tls: Tls | None, has_passwords: bool) -> str:
    """Write the lines of a listener for devices, or for everybody if the aggregator has none of its own."""
    lines = [f"listener {port} {address}".rstrip()]
    if tls:
        lines += _server_lines(tls)
    if tls and tls.client_ca:
        lines += _client_lines(tls.client_ca, tls.revoked, are_logins=not has_passwords)
    if tls and tls.aggregator_ca:
        lines.append("use_username_as_clientid true")
    return "\n".join(lines) + "\n"


def listener_of_aggregator(port: int, address: str, tls: Tls | None) -> str:
    """Client ids are free here: an aggregator has one a job, and asks under another whether it is the only one."""
    if tls is None or tls.aggregator_ca is None:
        return ""
    lines = [f"listener {port} {address}".rstrip(), *_server_lines(tls)]
    lines += _client_lines(tls.aggregator_ca, tls.revoked, are_logins=True)
    return "# Of the aggregator alone.\n" + "\n".join(lines) + "\n"


def _server_lines(tls: Tls) -> list[str]:
    return [
        f"certfile {tls.certificate.resolve()}",
        f"keyfile {tls.key.resolve()}",
        "tls_version tlsv1.2",
    ]


def _client_lines(authority: Path, revoked: Path | None, *, are_logins: bool) -> list[str]:
    lines = [f"cafile {authority.resolve()}", "require_certificate true"]
    lines += [f"crlfile {revoked.resolve()}"] if revoked else []
    return lines + (["use_identity_as_username true"] if are_logins else [])
