"""A device's own folder, which survives its process: where it is, and the name kept there."""

import secrets
from pathlib import Path

from fleetune.device_runtime.agent.outbox import Outbox
from fleetune.device_runtime.contracts.fields import check_name, is_name
from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.files import doing


def state_folder(state: Path | str | None, *, job: str, device_id: str | None) -> Path:
    """Return the folder, made if it is not there; StateError if it cannot be made."""
    folder = folder_of(state, job=job, device_id=device_id)
    with doing("made", folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what it owes may give its data away
    return folder


def folder_of(state: Path | str | None, *, job: str, device_id: str | None) -> Path:
    """Return where a device's folder is, or would be."""
    return Path(state) if state else Path.home() / ".fleetune" / job / (device_id or "device")


def identify(outbox: Outbox, given: str | None, login: str | None = None) -> str:
    """Return the name given, or kept; else the user name, which servers that separate devices expect, or one made up.

    Raises:
        ConfigError: the name given is none.
        StateError: the name kept is damaged.
    """
    if given:
        return check_name("device", given)
    kept = outbox.recall("device_id")
    if kept is None:
        made = login if login and is_name(login) else f"device-{secrets.token_hex(6)}"
        outbox.remember("device_id", kept := made.encode())
    try:
        return check_name("device", kept.decode())
    except (ConfigError, UnicodeDecodeError) as exc:
        raise StateError(f"outbox: the device's id is damaged ({exc}); give it as --id") from exc
