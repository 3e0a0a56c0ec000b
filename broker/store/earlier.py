"""A job that an earlier release began goes on by the rules that it began with: what entered later stays off, which is told."""

from typing import Any

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.device_runtime.prepared import prepared

LATER: dict[str, Any] = {"weight_cap": 0.0, "length_cap": 0.0, "heading": 0.0, "strikes": 0}
"""Settings whose defaults change what comes of a job and which releases since 0.1.0 have added, with what switches them off.

All others that were added do nothing by default. A setting that is to act by default belongs here, from its first release on.
"""
_FIELDS = {field.name: field.default for field in msgspec.structs.fields(Settings)}


def absent_in(text: str) -> tuple[str, ...]:
    """Return which of ``LATER`` the settings of a ledger do not say; MsgspecError for text that is no object."""
    said = msgspec.json.decode(text, type=prepared(dict[str, Any]))
    return tuple(name for name in LATER if name not in said)


def kept_settings(text: str) -> Settings:
    """Read a ledger's settings, with what it does not say switched off; MsgspecError if they are damaged."""
    kept = msgspec.json.decode(text, type=prepared(Settings))
    return msgspec.structs.replace(kept, **{name: LATER[name] for name in absent_in(text)})


def as_begun(settings: Settings, absent: tuple[str, ...]) -> Settings:
    """Switch off in what a start asks for what it leaves at a default that the job did not begin with."""
    unasked = [name for name in absent if getattr(settings, name) == _FIELDS[name]]
    return msgspec.structs.replace(settings, **{name: LATER[name] for name in unasked})


def text_of(settings: Settings, absent: tuple[str, ...]) -> str:
    """Write settings as a ledger keeps them; what it did not say, and is off, it goes on not to say."""
    said = msgspec.to_builtins(settings)
    off = [name for name in absent if said[name] == LATER[name]]
    return msgspec.json.encode({k: v for k, v in said.items() if k not in off}).decode()


def told(settings: Settings, absent: tuple[str, ...]) -> str:
    """Say in a line what stays off; empty if nothing does."""
    off = [name for name in absent if getattr(settings, name) == LATER[name]]
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in off)
    return (
        f"the job was begun by an earlier release, without {flags}: it goes on without; a job of another name and folder has it"
        if off
        else ""
    )
