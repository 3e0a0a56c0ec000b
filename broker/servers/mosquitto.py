"""A Mosquitto configuration for operators: logins, a device sees only its own topics, limits, persistence."""

import logging
import os
import pwd
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import ConfigError

log = logging.getLogger(__name__)

CONFIGURATION = "mosquitto.conf"
ACL = "fleetune.acl"
_DATA = "data"

_LIMITS = """\
# A packet larger than this has its sender disconnected; fleetune sends at most 128 kB and asks the server first.
max_packet_size 2000000
# Past these limits a slow reader's messages are dropped without a word; fleetune asks for them again.
max_queued_messages 2000
max_queued_bytes 268435456
max_inflight_messages 20
max_keepalive 600
set_tcp_nodelay true
"""
_MOSQUITTO = "mosquitto"
"""Whom Mosquitto becomes, unless told otherwise, when root starts it."""
_ACL = """\
# A device's user name is its device id, and it may use its own topics only.
pattern readwrite fleetune/v1/+/device/%u/#

user {aggregator}
topic readwrite fleetune/v1/#
"""
_STATUS = "read fleetune/v1/+/aggregator/status"
_OF_USERS = "\n# Every device of the password file; after adding one, write this file anew.\n"
_OF_ALL = "\n# Whoever has a certificate; Mosquitto remarks that no user name is in it.\npattern {status}\n"


class Tls(NamedTuple):
    """PEM files of the server; with ``client_ca`` every client must show a certificate of that authority.

    Without a password file the name in the certificate (CN) is the client's user name then.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


def write_configuration(
    folder: Path | str,
    *,
    port: int = 1883,
    host: str | None = None,
    password_file: Path | str | None = None,
    aggregator: str = "aggregator",
    tls: Tls | None = None,
    websockets_port: int | None = None,
    persistence: bool = True,
    user: str | None = None,
) -> Path:
    """Write ``mosquitto.conf`` and, with logins, its ACL file; run it with ``mosquitto -c``.

    Args:
        folder: where to write; made if need be.
        port: of the MQTT listener.
        host: address to listen on; default is every address with logins, this machine only without.
        password_file: made with ``mosquitto_passwd``; one user per device, named like its device id. None: no logins, and
            no ACL unless clients show certificates.
        aggregator: user name that may use every fleetune topic.
        tls: of every listener; None is plain.
        websockets_port: of a second listener, for networks that let only web traffic through. Mosquitto 2.0 with
            libwebsockets before 4.2 (Debian 12 has it) sends packets beyond 4 kB there slowly, about 50 kB/s.
        persistence: keep retained and queued messages on disk, saved every minute.
        user: whom Mosquitto becomes when root starts it; default is who calls this, and Mosquitto's own, ``mosquitto``,
            if that is root. The folder for persistence is made theirs; files that they cannot read are warned of.

    Returns:
        Path of the configuration.

    Raises:
        ConfigError: a port out of range or used twice, or a file that is not there (all listed).
    """
    files = [password_file, *(tls or ())]
    problems = [
        *_port_problems(port, websockets_port),
        *(f"{f}: no such file" for f in files if f and not Path(f).is_file()),
    ]
    if problems:
        raise ConfigError("Mosquitto configuration: " + "; ".join(problems))
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    has_names = bool(password_file or (tls and tls.client_ca))
    address = host or ("" if has_names else "127.0.0.1")
    is_root = os.geteuid() == 0
    user = user or ("" if is_root or not has_names else pwd.getpwuid(os.geteuid()).pw_name)
    blocks = [
        "# Written by fleetune; see mosquitto.conf(5).\n",
        f"user {user}\n" if user else "",
        _login(folder, password_file, has_names=has_names),
        _LIMITS,
        _persistence(folder) if persistence else "",
        _listener(port, address, tls, has_passwords=bool(password_file)),
        _websockets(websockets_port, address, tls, has_passwords=bool(password_file)),
    ]
    if has_names:
        write_atomically(folder / ACL, _acl(password_file, aggregator).encode())
    write_atomically(folder / CONFIGURATION, "\n".join(filter(None, blocks)).encode())
    if is_root:
        _hand_over(folder, user or _MOSQUITTO, [Path(f) for f in files if f])
    return folder / CONFIGURATION


def _port_problems(port: int, websockets_port: int | None) -> list[str]:
    ports = [port] if websockets_port is None else [port, websockets_port]
    problems = [f"port {number}: expected 1 to 65535" for number in ports if not 0 < number < 65536]
    return problems if len(set(ports)) == len(ports) else [*problems, f"port {port} is used twice"]


def _login(folder: Path, password_file: Path | str | None, *, has_names: bool) -> str:
    if not has_names:
        return "# No logins: for trials on this machine.\nallow_anonymous true\n"
    passwords = f"password_file {Path(password_file).resolve()}\n" if password_file else ""
    return f"allow_anonymous false\n{passwords}acl_file {folder / ACL}\n"


def _acl(password_file: Path | str | None, aggregator: str) -> str:
    text = _ACL.format(aggregator=aggregator)
    if password_file is None:
        return text + _OF_ALL.format(status=_STATUS)
    # A pattern without a user name in it would do for all of them, and Mosquitto would warn of it at every start.
    users = _users(Path(password_file))
    if aggregator not in users:
        log.warning("%s: no user %r, who is the aggregator", password_file, aggregator)
    devices = [name for name in users if name and not name.startswith("#") and name != aggregator]
    return text + _OF_USERS + "".join(f"user {name}\ntopic {_STATUS}\n" for name in devices)


def _users(password_file: Path) -> list[str]:
    try:
        return [line.partition(":")[0] for line in password_file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{password_file}: not made with mosquitto_passwd: {getattr(exc, 'strerror', None) or exc}"
        ) from exc


def _hand_over(folder: Path, user: str, files: Iterable[Path]) -> None:
    """Give ``user`` the folder for persistence, and warn of what root has written or named that they cannot read."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return  # the configuration is for another machine
    data = folder / _DATA
    for path in [data, *data.glob("*")] if data.is_dir() else []:
        os.chown(path, found.pw_uid, found.pw_gid)
    groups = {*os.getgrouplist(user, found.pw_gid)}
    for path in [*files, folder / CONFIGURATION]:
        if closed := _closed_to(found.pw_uid, groups, path.resolve()):
            log.warning(
                "%s: user %r, whom Mosquitto becomes when root starts it, cannot read %s; chown %s: %s",
                path, user, closed, user, closed,
            )  # fmt: skip


def _closed_to(uid: int, groups: set[int], path: Path) -> Path | None:
    """The file, or the folder above it, that keeps a user from reading it."""
    for place in [*reversed(path.parents), path]:
        status = place.stat()
        shift = 6 if status.st_uid == uid else 3 if status.st_gid in groups else 0
        needed = 4 if place == path else 1
        if uid != 0 and not (status.st_mode >> shift) & needed:
            return place
    return None


def _persistence(folder: Path) -> str:
    data = folder / _DATA
    data.mkdir(exist_ok=True)
    return f"persistence true\npersistence_location {data}/\nautosave_interval 60\npersistent_client_expiration 1d\n"


def _websockets(port: int | None, address: str, tls: Tls | None, *, has_passwords: bool) -> str:
    if port is None:
        return ""
    # https://github.com/eclipse-mosquitto/mosquitto/issues/2252
    warning = "# Mosquitto 2.0 with libwebsockets before 4.2 is slow here.\n"
    return warning + _listener(port, address, tls, has_passwords=has_passwords) + "protocol websockets\n"


def _listener(port: int, address: str, tls: Tls | None, *, has_passwords: bool) -> str:
    lines = [f"listener {port} {address}".rstrip()]
    if tls:
        lines += [
            f"certfile {tls.certificate.resolve()}",
            f"keyfile {tls.key.resolve()}",
            "tls_version tlsv1.2",
        ]
    if tls and tls.client_ca:
        lines += [f"cafile {tls.client_ca.resolve()}", "require_certificate true"]
        lines += [] if has_passwords else ["use_identity_as_username true"]
    return "\n".join(lines) + "\n"
