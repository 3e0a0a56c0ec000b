"""When a device may train: the rules as one TOML table, and the pure function that judges a reading of the system."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from fleetune.device_runtime.tables import Table

PowerSource = Literal["mains", "battery"]
NetworkKind = Literal["wired", "wireless", "cellular", "other", "none"]
OnMissing = Literal["allow", "deny"]
_Window = Annotated[
    str,
    Meta(
        pattern=r"^([01]\d|2[0-3]):[0-5]\d-(([01]\d|2[0-3]):[0-5]\d|24:00)$",
        description="'HH:MM-HH:MM' from 00:00 to 24:00",
    ),
]


class _Rule(msgspec.Struct, frozen=True, kw_only=True):
    on_missing: OnMissing = "allow"
    """What it says where its sensor is missing or lies."""


class Power(_Rule, frozen=True, kw_only=True):
    """Power sources on which it may train."""

    allowed: Annotated[tuple[PowerSource, ...], Meta(min_length=1)] = ("mains",)


class Battery(_Rule, frozen=True, kw_only=True):
    """Charge below which it pauses; it resumes ``margin_percent`` above, or at 100."""

    min_percent: Annotated[float, Meta(ge=0, le=100)]
    margin_percent: Annotated[float, Meta(ge=0, le=50)] = 5.0


class Temperature(_Rule, frozen=True, kw_only=True):
    """Degrees Celsius of the hottest zone above which it pauses; it resumes ``margin_c`` below."""

    max_c: Annotated[float, Meta(ge=20, le=125)]
    margin_c: Annotated[float, Meta(ge=0, le=50)] = 5.0
    zones: tuple[str, ...] = ()
    """Types of the thermal zones that count; all of them where none is named."""


class Load(_Rule, frozen=True, kw_only=True):
    """Share of all cores' time taken by *other* processes above which it pauses; it resumes ``margin_share`` below."""

    max_share: Annotated[float, Meta(ge=0.01, le=1)]
    margin_share: Annotated[float, Meta(ge=0, le=1)] = 0.1


class Hours(_Rule, frozen=True, kw_only=True):
    """Local times of day at which it may train: ``22:00-06:00``, across midnight too."""

    windows: Annotated[tuple[_Window, ...], Meta(min_length=1)]


class Network(_Rule, frozen=True, kw_only=True):
    """Kinds of uplink (where the default route goes) with which it may train, fetch and deliver."""

    allowed: Annotated[tuple[NetworkKind, ...], Meta(min_length=1)] = ("wired", "wireless")


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """The table. A rule that is not there is not asked."""

    power: Power | None = None
    battery: Battery | None = None
    temperature: Temperature | None = None
    load: Load | None = None
    hours: Hours | None = None
    network: Network | None = None
    nice: Annotated[int, Meta(ge=0, le=19)] = 0
    """Scheduling priority that the process gives up at its start; 0 leaves it alone."""
    period_s: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    """Sensors are read at most so often."""
    resume_after_s: Annotated[float, Meta(ge=0, le=86400)] = 10.0
    """All rules must have held for so long before it resumes."""
    root: str = "/"
    """Folder in which ``sys`` and ``proc`` are found: a container's view of its host, or a pretended system."""

    @property
    def asked(self) -> dict[str, Any]:
        """The rules that are there, by name."""
        return {name: rule for name in JUDGES if (rule := getattr(self, name)) is not None}


class Reading(NamedTuple):
    """What the sensors say, by the rule that asks; None where they are missing or lie."""

    power: PowerSource | None = None
    battery: float | None = None
    """Percent."""
    temperature: float | None = None
    """Degrees Celsius."""
    load: float | None = None
    """Share of all cores' time, 0 to 1."""
    hours: int | None = None
    """Minute of the local day, from 0."""
    network: NetworkKind | None = None
    doubts: Mapping[str, str] = {}
    """What is wrong with a sensor, by rule."""


def reasons(rules: Rules, reading: Reading, *, held: Collection[str] = ()) -> dict[str, str]:
    """Why not to train now: a sentence by the rule that forbids it; empty if all allow.

    Args:
        rules: the table.
        reading: what the sensors say.
        held: rules that forbade it before; they ask for their margin on top.
    """
    found = {}
    for name, rule in rules.asked.items():
        value = getattr(reading, name)
        if value is None or value != value:
            why = reading.doubts.get(name, "no sensor")
            found[name] = f"{name} is unknown ({why})" if rule.on_missing == "deny" else ""
        else:
            found[name] = JUDGES[name](rule, value, name in held)
    return {name: reason for name, reason in found.items() if reason}


def contradictions(rules: Rules) -> Iterator[str]:
    """What in the rules cannot be meant."""
    if rules.load and rules.load.margin_share >= rules.load.max_share:
        yield f"load: margin_share {rules.load.margin_share:g} must be below max_share {rules.load.max_share:g}"
    for window in rules.hours.windows if rules.hours else ():
        start, end = _minutes(window)
        if start == end:
            yield f"hours.windows: {window!r} is empty; all day is '00:00-24:00'"


def _power(rule: Power, source: str, _held: bool) -> str:
    return "" if source in rule.allowed else f"power comes from {source}, not {' or '.join(rule.allowed)}"


def _battery(rule: Battery, percent: float, held: bool) -> str:
    least = min(100.0, rule.min_percent + rule.margin_percent * held)
    return (
        f"battery at {percent:g} % is {'not yet at' if held else 'below'} {least:g} %"
        if percent < least
        else ""
    )


def _temperature(rule: Temperature, degrees: float, held: bool) -> str:
    most = rule.max_c - rule.margin_c * held
    return f"temperature {degrees:.1f} C is {_above(held)} {most:g} C" if degrees > most else ""


def _load(rule: Load, share: float, held: bool) -> str:
    most = rule.max_share - rule.margin_share * held
    return f"others' load {share:.2f} is {_above(held)} {most:.2f}" if share > most else ""


def _hours(rule: Hours, minute: int, _held: bool) -> str:
    if any(_is_within(minute, *_minutes(window)) for window in rule.windows):
        return ""
    return f"{minute // 60:02d}:{minute % 60:02d} is outside {' and '.join(rule.windows)}"


def _network(rule: Network, kind: str, _held: bool) -> str:
    return "" if kind in rule.allowed else f"network is {kind}, not {' or '.join(rule.allowed)}"


def _above(held: bool) -> str:
    return "not yet down to" if held else "above"


def _minutes(window: str) -> tuple[int, int]:
    start, end = (int(time[:2]) * 60 + int(time[3:]) for time in window.split("-"))
    return start, end


def _is_within(minute: int, start: int, end: int) -> bool:
    return start <= minute < end if start < end else minute >= start or minute < end


JUDGES: Table[Callable[[Any, Any, bool], str]] = Table(
    "rule",
    {
        "power": _power,
        "battery": _battery,
        "temperature": _temperature,
        "load": _load,
        "hours": _hours,
        "network": _network,
    },
)
"""(rule, value, whether it forbade it before) -> why not; empty if it allows."""
