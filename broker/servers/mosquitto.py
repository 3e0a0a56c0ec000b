"""A Mosquitto configuration for operators: logins, a device sees only its own topics, limits, persistence."""

from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.errors import ConfigError

CONFIGURATION = "mosquitto.conf"
ACL = "fleetune.acl"

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
_ACL = """\
# A device logs in with its device id as user name and may use its own topics only.
pattern readwrite fleetune/v1/+/device/%u/#
pattern read fleetune/v1/+/aggregator/status
"""


class Tls(NamedTuple):
    """PEM files of the server; with ``client_ca`` every client must show a certificate of that authority."""

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
        password_file: made with ``mosquitto_passwd``; one user per device, named like its device id. None: no logins, no ACL.
        aggregator: user name that may use every fleetune topic.
        tls: of every listener; None is plain.
        websockets_port: of a second listener, for networks that let only web traffic through. Mosquitto 2.0 with
            libwebsockets before 4.2 (Debian 12 has it) sends packets beyond 4 kB there slowly, about 50 kB/s.
        persistence: keep retained and queued messages on disk, saved every minute.
        user: whom Mosquitto becomes when root starts it; default is its own, ``mosquitto``.

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
    address = host or ("" if password_file else "127.0.0.1")
    blocks = [
        "# Written by fleetune; see mosquitto.conf(5).\n",
        f"user {user}\n" if user else "",
        _login(folder, password_file),
        _LIMITS,
        _persistence(folder) if persistence else "",
        _listener(port, address, tls),
        _websockets(websockets_port, address, tls) if websockets_port else "",
    ]
    if password_file:
        acl = f"{_ACL}\nuser {aggregator}\ntopic readwrite fleetune/v1/#\n"
        write_atomically(folder / ACL, acl.encode())
    write_atomically(folder / CONFIGURATION, "\n".join(filter(None, blocks)).encode())
    return folder / CONFIGURATION


def _port_problems(port: int, websockets_port: int | None) -> list[str]:
    ports = [port] if websockets_port is None else [port, websockets_port]
    problems = [f"port {number}: expected 1 to 65535" for number in ports if not 0 < number < 65536]
    return problems if len(set(ports)) == len(ports) else [*problems, f"port {port} is used twice"]


def _login(folder: Path, password_file: Path | str | None) -> str:
    if password_file is None:
        return "# No logins: for trials on this machine.\nallow_anonymous true\n"
    return f"allow_anonymous false\npassword_file {Path(password_file).resolve()}\nacl_file {folder / ACL}\n"


def _persistence(folder: Path) -> str:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    return f"persistence true\npersistence_location {data}/\nautosave_interval 60\npersistent_client_expiration 1d\n"


def _websockets(port: int, address: str, tls: Tls | None) -> str:
    # https://github.com/eclipse-mosquitto/mosquitto/issues/2252
    warning = "# Mosquitto 2.0 with libwebsockets before 4.2 is slow here.\n"
    return warning + _listener(port, address, tls) + "protocol websockets\n"


def _listener(port: int, address: str, tls: Tls | None) -> str:
    lines = [f"listener {port} {address}".rstrip()]
    if tls:
        lines += [
            f"certfile {tls.certificate.resolve()}",
            f"keyfile {tls.key.resolve()}",
            "tls_version tlsv1.2",
        ]
    if tls and tls.client_ca:
        lines += [f"cafile {tls.client_ca.resolve()}", "require_certificate true"]
    return "\n".join(lines) + "\n"
