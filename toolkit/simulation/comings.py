"""Devices come and go: absences, drop-outs in the middle of work, and those that can do none of it."""

from collections.abc import Mapping
from functools import partial

from fleetune.toolkit.simulation.availability import back_at, dropout, is_there, leaves_at
from fleetune.toolkit.simulation.book import Book
from fleetune.toolkit.simulation.clock import Alarms
from fleetune.toolkit.simulation.config import SimulationConfig
from fleetune.toolkit.simulation.desks import Started
from fleetune.toolkit.simulation.fleet import DeviceSpec
from fleetune.toolkit.simulation.members import VirtualDevice

_AWAY_S = 600.0
"""Where rounds have no deadline, a device that vanished is back after this time at the latest."""

_MOMENT_S = 1e-6


class Comings:
    """Who is there, by the availability that the configuration gives the fleet."""

    def __init__(
        self, config: SimulationConfig, devices: Mapping[str, VirtualDevice], alarms: Alarms, book: Book
    ) -> None:
        """Prepare; ``devices`` by name may be filled later."""
        self._rules, self._seed = config.availability, config.seed
        self._away_s = config.patience.deadline_s or _AWAY_S
        self._devices, self._alarms, self._book = devices, alarms, book
        self._vanished: set[str] = set()
        self._drawn: dict[str, int] = {}
        """The round in which each device was last drawn to vanish: it does so once in a round."""
        self._retired: set[str] = set()

    def begin(self) -> None:
        """Have all devices arrive that are there at the start."""
        for name in self._devices:
            self._come(name, 0.0)

    def known(self, spec: DeviceSpec, started: Started) -> None:
        """The end of a run is known: and so is when the device vanishes, if it does."""
        number, run = started.work.rounds_before + 1, started.run
        found = dropout(self._rules, seed=self._seed, device=spec.number, round_number=number)
        if found and self._drawn.get(spec.name) != number:
            self._drawn[spec.name] = number
            at = run.begins_at + found.at * (run.ends_at - run.begins_at)
            self._alarms.at(at, partial(self._vanish, spec.name, started))

    def bring_back(self, now: float) -> None:
        """A round is over: whoever vanished in it comes back."""
        for name in sorted(self._vanished):
            self._come(name, now)
        self._vanished.clear()

    def retire(self, name: str) -> None:
        """A device goes for good, when what it has sent has arrived."""
        self._retired.add(name)
        self._alarms.at(self._devices[name].sent_by + _MOMENT_S, partial(self._lose, name))

    def _vanish(self, name: str, started: Started, now: float) -> None:
        """A device is gone, if it is still at the run that this was drawn for: until the round is over, or long past."""
        device = self._devices[name]
        if device.is_there and device.desk.current is started:
            self._vanished.add(name)
            self._lose(name, now)
            self._alarms.at(now + self._away_s, partial(self._come, name))

    def _lose(self, name: str, now: float) -> None:
        device = self._devices[name]
        if device.desk.ends_at > now:
            self._book.lost(name)
        device.leave(now)

    def _come(self, name: str, now: float) -> None:
        """A device arrives, if this is a time at which it is there, and leaves when that is over."""
        if name in self._retired or self._devices[name].is_there:
            return
        number = int(name.rpartition("-")[2])
        if not is_there(self._rules, now, seed=self._seed, device=number):
            back = back_at(self._rules, now, seed=self._seed, device=number)
            self._alarms.at(back, partial(self._come, name))
            return
        self._vanished.discard(name)
        self._devices[name].arrive(now)
        leaves = leaves_at(self._rules, now, seed=self._seed, device=number)
        self._alarms.at(leaves, partial(self._go, name))

    def _go(self, name: str, now: float) -> None:
        self._lose(name, now)
        self._come(name, now)
