"""Which devices may do what in a job."""

from pathlib import Path
from typing import Annotated

import msgspec

from fleetune.device_runtime.contracts.fields import (
    check_name,
)
from fleetune.device_runtime.errors import ConfigError, one_line
from fleetune.device_runtime.options import Option


class Members(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices may do what; every start may say something else."""

    evaluators: Annotated[
        str,
        Option(
            "the devices that may evaluate, separated by commas, or a file with one a line; without it all that say so",
            metavar="NAMES",
        ),
    ] = ""
    pardon: Annotated[
        str,
        Option("devices, separated by commas, whose marks are forgiven at this start", metavar="NAMES"),
    ] = ""


def names_in(said: str) -> tuple[str, ...]:
    """Return the devices of a list with commas, or of a file of that name with one a line; all different, in their order.

    Raises:
        ConfigError: a name that no device can have, or a file that cannot be read.
    """
    path = Path(said)
    try:
        text = path.read_text(encoding="utf-8") if said and path.is_file() else said.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{said}: cannot be read: {one_line(exc)}") from exc
    names = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    return tuple(check_name("device", name) for name in names)
