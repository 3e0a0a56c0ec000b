"""Who may use which topic: Mosquitto's access list, by user name, which a certificate says too."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.contracts.wire import aggregator_topic, device_topic, shared_topic
from fleetune.device_runtime.errors import ConfigError

log = logging.getLogger(__name__)

_RIGHTS = {"down": "read", "up": "write", "status": "readwrite"}
"""Of a device, on its own topics; it reads its status to find another device of its name."""
_ALL_JOBS = "+"


def access_list(password_file: Path | str | None, aggregator: str, jobs: Sequence[str] = ()) -> str:
    """Write the access list of devices, in ``jobs`` or in every job, and of the aggregator.

    Raises:
        ConfigError: a password file that is none, or a job's name that is none.
    """
    names = [check_name("job", job) for job in jobs] or [_ALL_JOBS]
    lines = [
        "# A device's user name is its device id, and it may use its own topics only.",
        *(
            f"pattern {right} {device_topic(job, '%u', leaf)}"
            for job in names
            for leaf, right in _RIGHTS.items()
        ),
        "",
        f"user {aggregator}",
        "topic readwrite fleetune/v1/#",
        "",
        *_common_lines(password_file, aggregator, [*_common(names)]),
    ]
    return "\n".join(lines) + "\n"


def _common(jobs: Sequence[str]) -> Iterator[str]:
    """What every device may read: the aggregator's status, and chunks that are published once for all."""
    for job in jobs:
        yield f"read {aggregator_topic(job)}"
        yield f"read {shared_topic(job, '+', '+')}"


def _common_lines(password_file: Path | str | None, aggregator: str, rights: Sequence[str]) -> Iterator[str]:
    if password_file is None:
        yield "# Whoever has a certificate; Mosquitto remarks that no user name is in it."
        yield from (f"pattern {right}" for right in rights)
        return
    # A pattern without a user name in it would do for all of them, and Mosquitto would warn of it at every start.
    yield "# Every device of the password file; after adding one, write this file anew."
    users = _users(Path(password_file))
    if aggregator not in users:
        log.warning("%s: no user %r, who is the aggregator", password_file, aggregator)
    for name in users:
        if name and not name.startswith("#") and name != aggregator:
            yield f"user {name}"
            yield from (f"topic {right}" for right in rights)


def _users(password_file: Path) -> list[str]:
    try:
        return [line.partition(":")[0] for line in password_file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(
            f"{password_file}: not made with mosquitto_passwd: {getattr(exc, 'strerror', None) or exc}"
        ) from exc
