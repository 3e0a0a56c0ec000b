"""A Mosquitto configuration for operators: logins, a device sees only its own topics, limits, persistence."""

import logging
import os
import pwd
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from fleetune.broker.servers.access import access_list
from fleetune.broker.servers.listeners import (
    Tls,
    copied,
    listener,
    listener_of_aggregator,
    of_authority,
    problems_of,
)
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import private_file

log = logging.getLogger(__name__)

CONFIGURATION = "mosquitto.conf"
ACL = "fleetune.acl"
_DATA, _TLS = "data", "tls"

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
# https://github.com/eclipse-mosquitto/mosquitto/issues/2252
_SLOW = "# Mosquitto 2.0 with libwebsockets before 4.2 is slow here.\n"
_MOSQUITTO = "mosquitto"
"""Whom Mosquitto becomes, unless told otherwise, when root starts it."""


def write_configuration(
    folder: Path | str,
    *,
    port: int | None = None,
    host: str | None = None,
    password_file: Path | str | None = None,
    aggregator: str = "aggregator",
    tls: Tls | None = None,
    authority: Path | str | None = None,
    aggregator_port: int | None = None,
    jobs: Sequence[str] = (),
    websockets_port: int | None = None,
    max_connections: int | None = None,
    persistence: bool = True,
    log_file: Path | None = None,
    log_packets: bool = False,
    user: str | None = None,
) -> Path:
    """Write ``mosquitto.conf`` and, with logins, its ACL file; run it with ``mosquitto -c``.

    Args:
        folder: where to write; made if need be.
        port: of the devices' listener; by default 1883, with an authority 8883.
        host: address to listen on; default is every address with logins, this machine only without.
        password_file: made with ``mosquitto_passwd``: one user a device, named like its id; without it no logins, and
            no ACL unless clients show certificates.
        aggregator: user name that may use every fleetune topic.
        tls: of every listener; None is plain.
        authority: folder of ``fleetune authority``, in the place of ``tls``; what the server needs of it is copied here.
        aggregator_port: of the listener for the aggregator where it has one (``Tls.aggregator_ca``); by default the next.
        jobs: devices may use the topics of these alone; by default of every job.
        websockets_port: of a second listener, for networks that let only web traffic through. Mosquitto 2.0 with
            libwebsockets before 4.2 (Debian 12 has it) sends packets beyond 4 kB there slowly, about 50 kB/s.
        max_connections: on the devices' listener; one more is hung up on.
        persistence: keep retained and queued messages on disk, saved every minute.
        log_file: in the place of standard error.
        log_packets: write every packet down, and so each message that the access list denies.
        user: whom Mosquitto becomes when root starts it; default is who calls this, and Mosquitto's own, ``mosquitto``,
            if that is root. The folder for persistence is made theirs; files that they cannot read are warned of.

    Returns:
        Path of the configuration.

    Raises:
        ConfigError: a port out of range or used twice, or a file that is not there (all listed).
    """
    if authority and (tls or password_file):
        raise ConfigError("Mosquitto configuration: an authority brings certificates and logins of its own")
    tls = of_authority(Path(authority)) if authority else tls
    if port is None:
        port = 8883 if authority else 1883
    if tls and tls.aggregator_ca and aggregator_port is None:
        aggregator_port = port + 1
    files = [Path(file) for file in [password_file, *(tls or ())] if file]
    if problems := [
        *_port_problems([port, aggregator_port, websockets_port]),
        *(f"{file}: no such file" for file in files if not file.is_file()),
        *problems_of(
            tls,
            websockets_port=websockets_port,
            aggregator_port=aggregator_port,
            has_passwords=bool(password_file),
        ),
        *_limit_problems(max_connections),
    ]:
        raise ConfigError("Mosquitto configuration: " + "; ".join(problems))
    has_names = bool(password_file or (tls and tls.client_ca))
    access = access_list(password_file, aggregator, jobs) if has_names else ""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if authority and tls:
        tls = copied(tls, folder / _TLS)
    address = host or ("" if has_names else "127.0.0.1")
    is_root = os.geteuid() == 0
    user = user or ("" if is_root or not has_names else pwd.getpwuid(os.geteuid()).pw_name)
    with_names = partial(listener, address=address, tls=tls, has_passwords=bool(password_file))
    blocks = [
        "# Written by fleetune; see mosquitto.conf(5).\n",
        f"user {user}\n" if user else "",
        _login(folder, password_file, has_names=has_names),
        _LIMITS,
        _logging(log_file, packets=log_packets),
        _persistence(folder) if persistence else "",
        with_names(port) + (f"max_connections {max_connections}\n" if max_connections else ""),
        listener_of_aggregator(aggregator_port, address, tls) if aggregator_port else "",
        _SLOW + with_names(websockets_port) + "protocol websockets\n" if websockets_port else "",
    ]
    if has_names:
        write_atomically(folder / ACL, access.encode())
    write_atomically(folder / CONFIGURATION, "\n".join(filter(None, blocks)).encode())
    if log_file:
        private_file(log_file)
    if is_root:
        _hand_over(folder, user or _MOSQUITTO, [Path(f) for f in [password_file, *(tls or ())] if f], log_file)  # fmt: skip
    return folder / CONFIGURATION


def _limit_problems(max_connections: int | None) -> list[str]:
    if max_connections is None or max_connections > 0:
        return []
    return [f"--max-connections {max_connections}: expected 1 or more"]


def _port_problems(given: Sequence[int | None]) -> list[str]:
    ports = [number for number in given if number is not None]
    problems = [f"port {number}: expected 1 to 65535" for number in ports if not 0 < number < 65536]
    twice = {number for number in ports if ports.count(number) > 1}
    return [*problems, *(f"port {number} is used twice" for number in sorted(twice))]


def _login(folder: Path, password_file: Path | str | None, *, has_names: bool) -> str:
    if not has_names:
        return "# No logins: for trials on this machine.\nallow_anonymous true\n"
    passwords = f"password_file {Path(password_file).resolve()}\n" if password_file else ""
    return f"allow_anonymous false\n{passwords}acl_file {folder / ACL}\n"


def _hand_over(folder: Path, user: str, files: Iterable[Path], log_file: Path | None) -> None:
    """Give ``user`` what is written for them alone, and warn of what root has written or named that they cannot read."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        return  # the configuration is for another machine
    own = [folder / _DATA, folder / _TLS]
    theirs = [path for part in own if part.is_dir() for path in (part, *part.glob("*"))]
    for path in [*theirs, *([log_file] if log_file else [])]:
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


def _logging(file: Path | None, *, packets: bool) -> str:
    kinds = ["all"] if packets else ["error", "warning", "notice", "information"]
    where = f"file {file.resolve()}" if file else "stderr"
    lines = [f"log_dest {where}", "log_timestamp_format %Y-%m-%dT%H:%M:%S"]
    return "\n".join([*lines, *(f"log_type {kind}" for kind in kinds)]) + "\n"
