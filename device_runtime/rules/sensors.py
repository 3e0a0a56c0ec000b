"""Readings of the system for the rules: power, battery, temperature, load, time of day, network, from ``/sys`` and ``/proc``.

Sources: the kernel's Documentation/ABI/testing/sysfs-class-power and Documentation/driver-api/thermal/sysfs-api.rst.
"""

from collections.abc import Callable, Collection
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from fleetune.device_runtime.rules.processor_time import Ticks, read_ticks
from fleetune.device_runtime.rules.rules import JUDGES, NetworkKind, PowerSource, Reading, Rules
from fleetune.device_runtime.rules.sysfs import list_folders, number_of, read_text
from fleetune.device_runtime.rules.uplink import uplink_kind
from fleetune.device_runtime.tables import Table

_COLDEST_C, _HOTTEST_C = -40.0, 125.0
_NEAR_ZERO_C = 1.0
"""A zone that is off says 0, and one that counts in degrees instead of thousandths says less than this."""
_TICKS_MIN = 50
"""Fewer ticks of all cores than these tell nothing about the load."""
_YEAR_MIN = 2024
"""A board without a clock of its own starts in the past."""


class Sensors:
    """The sensors that some rules ask. Every reading reads them anew; nothing here raises."""

    def __init__(
        self,
        root: Path | str = "/",
        *,
        wanted: Collection[str] = tuple(JUDGES),
        zones: Collection[str] = (),
        wall: Callable[[], datetime] = datetime.now,
    ) -> None:
        """Prepare.

        Args:
            root: folder in which ``sys`` and ``proc`` are found.
            wanted: rules that ask.
            zones: types (or folder names) of the thermal zones that count; all where none is named.
            wall: local wall-clock time.
        """
        self._root, self._wanted, self._zones, self._wall = Path(root), tuple(wanted), tuple(zones), wall
        self._doubts: dict[str, str] = {}
        self._ticks: Ticks | None = None
        self._load = 0.0

    def read(self) -> Reading:
        """What they say now; None, with a doubt, for what is missing or implausible."""
        self._doubts = {}
        values: dict[str, Any] = {name: SENSORS[name](self) for name in self._wanted}
        return Reading(**values, doubts=self._doubts)

    def _power(self) -> PowerSource | None:
        supplies = self._supplies()
        plugs = {s.online for s in supplies if not s.is_battery}
        states = {s.status for s in supplies if s.is_battery}
        if plugs & {"1", "2"}:
            return "mains"
        if "Discharging" in states:
            return "battery"
        if states & {"Charging", "Full", "Not charging"}:
            return "mains"
        if "0" in plugs:
            return "battery"
        self._doubts["power"] = "no supply says whether it is online" if supplies else "no supply is listed"
        return None

    def _battery(self) -> float | None:
        percents = {s.name: s.percent for s in self._supplies() if s.is_battery}
        sane = [percent for percent in percents.values() if 0 <= percent <= 100]
        wrong = [f"{name} says {p:g} %" for name, p in percents.items() if not 0 <= p <= 100]
        if wrong or not percents:
            self._doubts["battery"] = ", ".join(wrong) or "no battery is listed"
        return sum(sane) / len(sane) if sane else None

    def _supplies(self) -> list["_Supply"]:
        folders = list_folders(self._root / "sys/class/power_supply", "*")
        return [supply for folder in folders if (supply := _supply(folder))]

    def _temperature(self) -> float | None:
        folders = list_folders(self._root / "sys/class/thermal", "thermal_zone*")
        kinds = {folder: read_text(folder / "type") or folder.name for folder in folders}
        named = set(self._zones)
        chosen = [f for f, kind in kinds.items() if not named or {kind, f.name} & named]
        said = {f"{folder.name} ({kinds[folder]})": read_text(folder / "temp") for folder in chosen}
        degrees = {zone: number_of(text) / 1000 for zone, text in said.items()}
        wrong = [f"{zone} says {said[zone]!r}" for zone, value in degrees.items() if not _is_plausible(value)]
        absent = named - set(kinds.values()) - {folder.name for folder in folders}
        if absent or not folders:
            listed = ", ".join(sorted(set(kinds.values()))) or "none"
            wrong.append(f"no thermal zone {' or '.join(sorted(absent)) or 'at all'}; listed: {listed}")
        if wrong:
            self._doubts["temperature"] = ", ".join(wrong)
        return max(filter(_is_plausible, degrees.values()), default=None)

    def _others_load(self) -> float | None:
        before, now = self._ticks, read_ticks(self._root)
        if now is None:
            self._doubts["load"] = "/proc/stat or /proc/self/stat cannot be read"
            return None
        if before is None:
            self._ticks, self._load = now, self._average(now.num_cores)
        elif not 0 <= now.total - before.total < _TICKS_MIN:
            share = now.others_since(before)
            self._ticks, self._load = now, share if share == share else self._load
        return self._load

    def _average(self, num_cores: int) -> float:
        """Before there is a difference to take: the last minute's load average, which this process has hardly touched."""
        average = number_of(read_text(self._root / "proc/loadavg").partition(" ")[0])
        return min(1.0, average / num_cores) if average >= 0 else 0.0

    def _minute(self) -> int | None:
        now = self._wall()
        if now.year < _YEAR_MIN:
            self._doubts["hours"] = f"the clock says {now:%Y-%m-%d}"
            return None
        return now.hour * 60 + now.minute

    def _network(self) -> NetworkKind | None:
        kind, doubt = uplink_kind(self._root)
        if doubt:
            self._doubts["network"] = doubt
        return kind


SENSORS: Table[Callable[[Sensors], Any]] = Table(
    "sensor",
    {
        "power": Sensors._power,
        "battery": Sensors._battery,
        "temperature": Sensors._temperature,
        "load": Sensors._others_load,
        "hours": Sensors._minute,
        "network": Sensors._network,
    },
)
"""By the rule that asks."""


def sensors_of(rules: Rules) -> Sensors:
    """The sensors that ``rules`` ask."""
    zones = rules.temperature.zones if rules.temperature else ()
    return Sensors(rules.root, wanted=tuple(rules.asked), zones=zones)


class _Supply(NamedTuple):
    name: str
    is_battery: bool
    online: str
    status: str
    percent: float


def _supply(folder: Path) -> _Supply | None:
    """A supply of the whole system; None for a mouse's battery, or one that was taken out."""
    kind = read_text(folder / "type")
    if not kind or read_text(folder / "scope") == "Device" or read_text(folder / "present") == "0":
        return None
    percent = number_of(read_text(folder / "capacity"))
    return _Supply(
        folder.name,
        kind in ("Battery", "UPS"),
        read_text(folder / "online"),
        read_text(folder / "status"),
        percent,
    )


def _is_plausible(degrees: float) -> bool:
    return _COLDEST_C <= degrees <= _HOTTEST_C and abs(degrees) >= _NEAR_ZERO_C
