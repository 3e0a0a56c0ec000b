"""``fleetune init``: a commented configuration for each of the three roles, made from the options themselves."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fleetune.broker.laws import TABLES
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.network.address import parse_url
from fleetune.toolkit.commands.options import AGGREGATE, DEVICE, PANELS, listed
from fleetune.toolkit.flags import Flag, Part, claimed

_WIDTH = 100
_RULES = """
# When the device may work; docs/device-rules.md has all of them. Without a table it always may.
# [rules]
# power = { allowed = ["mains"] }
# temperature = { max_c = 75 }
# hours = { windows = ["22:00-06:00"] }
"""


class _Role(NamedTuple):
    """What one of the files is about."""

    file: str
    table: str
    command: str
    head: str
    parts: Mapping[str, Part]
    more: str = ""


ROLES = (
    _Role(
        "aggregator.toml",
        "aggregate",
        "fleetune aggregate ARTIFACT --config aggregator.toml",
        "The aggregator: one for each job. The devices need no word of it.",
        AGGREGATE,
    ),
    _Role(
        "device.toml",
        "device",
        "fleetune device ARTIFACT --config device.toml",
        "A device that trains on its own data, which stays there. Copy it to each, with another id.",
        DEVICE,
        _RULES,
    ),
    _Role(
        "evaluator.toml",
        "device",
        "fleetune device ARTIFACT --config evaluator.toml",
        "A device that measures every version on data that nobody trains on.",
        DEVICE,
    ),
)


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and what to do with it."""

    files: list[str]
    commands: list[str]


def init(
    folder: Path | str = ".", *, job: str = "home", mqtt: str = "mqtts://server:8883", force: bool = False
) -> Written:
    """Write ``aggregator.toml``, ``device.toml`` and ``evaluator.toml``: what must be said, and every option with its default.

    Args:
        folder: where to; made if it is not there.
        job: name of the job.
        mqtt: URL of the MQTT server, without a login: that is in the environment.
        force: write over files that are there.

    Raises:
        ConfigError: a name or an address that is none, a login in the address, or a file that is there.
    """
    check_name("job", job)
    if parse_url(mqtt).username:
        raise ConfigError(
            "mqtt: a login in a file is read by whoever reads the file; put it into FLEETUNE_MQTT_USERNAME and "
            "FLEETUNE_MQTT_PASSWORD"
        )
    out = Path(folder)
    taken = [str(out / role.file) for role in ROLES if (out / role.file).exists()]
    if taken and not force:
        raise ConfigError(f"{', '.join(taken)}: there already; --force writes over it")
    with doing("written", out):
        out.mkdir(parents=True, exist_ok=True)
        for role in ROLES:
            write_atomically(out / role.file, text_of(role, job=job, mqtt=mqtt).encode())
    return Written(files=[str(out / role.file) for role in ROLES], commands=[role.command for role in ROLES])


def text_of(role: _Role, *, job: str, mqtt: str) -> str:
    """Write one file: what must be said first, then the other options, commented out, with their defaults."""
    must = _must(role, job=job, mqtt=mqtt)
    lines = [f"# {role.head}", f"#     {role.command}", "# Flags win over what is written here.", ""]
    lines += [f"[{role.table}]", *(f"{key} = {value}" for key, value in must.items())]
    heading = ""
    for part, flag in claimed(role.parts).values():
        if flag.name in must:
            continue
        if (panel := PANELS.get(part, part)) != heading:
            heading = panel
            lines += ["", f"## {heading}"]
        lines += _lines(flag)
    return "\n".join(lines) + "\n" + role.more


def _must(role: _Role, *, job: str, mqtt: str) -> dict[str, str]:
    named = {"mqtt": json.dumps(mqtt), "job": json.dumps(job)}
    if role.table == "aggregate":
        return {**named, "out": '"run"', "rounds": "20", "clients": "2"}
    own = {"id": '"judge"', "data": '"held-out.jsonl"', "role": '"evaluate"'}
    return {
        **named,
        **(own if role.file == "evaluator.toml" else {"id": '"kitchen"', "data": '"mine.jsonl"'}),
    }


def _lines(flag: Flag) -> Iterator[str]:
    option = flag.option
    names = [*filter(None, option.choices), *(TABLES[option.table] if option.table else ())]
    said = f"{option.help}: {listed(names)}" if names else option.help
    yield ""
    yield from (f"# {line}" for line in textwrap.wrap(said, _WIDTH, break_on_hyphens=False))
    yield f"# {flag.name} = {_toml(flag)}"


def _toml(flag: Flag) -> str:
    """A default as TOML has it; JSON's words are the same for what options hold."""
    if flag.default is msgspec.NODEFAULT or flag.default is None:
        return '""'
    value: Any = flag.default
    return json.dumps(value, ensure_ascii=False)
