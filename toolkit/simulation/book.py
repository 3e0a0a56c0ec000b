"""What is written down of a simulation: a record of each round when its version is measured, and of each device at the end."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.store import Arrival, Carried, Cost
from fleetune.broker.tasks import Mark, Task
from fleetune.device_runtime.contracts.wire import UpdateReady
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.toolkit.simulation.desks import Started
from fleetune.toolkit.simulation.fleet import DeviceSpec
from fleetune.toolkit.simulation.profiles import energy_j
from fleetune.toolkit.simulation.records import Choice, DeviceRecord, RoundRecord, finite
from fleetune.toolkit.simulation.virtual_run import VirtualRun
from fleetune.toolkit.simulation.working import Working

COUNTED, LATE, DROPPED, DECLINED = "counted", "late", "dropped-out", "declined"


@dataclass
class _Asked:
    """A device in the open round."""

    task: Task
    since: float
    outcome: str = LATE
    seconds: float | None = None
    left_at: float | None = None
    """When it was gone."""
    runs: list[VirtualRun] = field(default_factory=list)
    gain: float | None = None
    personal: float | None = None

    @property
    def peak_mb(self) -> float:
        return max((run.account.peak_mb for run in self.runs), default=0.0)


@dataclass
class _Sums:
    """Of one device over all rounds."""

    rounds: int = 0
    compute_s: float = 0.0
    energy_j: float = 0.0
    peak_mb: float = 0.0


class Book:
    """Told of everything; makes records."""

    def __init__(self, specs: Iterable[DeviceSpec], clock: Callable[[], float]) -> None:
        """Begin."""
        self.device_rounds = 0
        self._specs = {spec.name: spec for spec in specs}
        self._clock, self._wall = clock, time.perf_counter()
        self._asked: dict[str, _Asked] = {}
        self._working = {name: Working() for name in self._specs}
        self._sums = {name: _Sums() for name in self._specs}

    def enrolled(self, tasks: Iterable[Task]) -> None:
        """Devices are asked."""
        now = self._clock()
        self._asked |= {task.device_id: _Asked(task, now) for task in tasks if task.role == "train"}

    def started(self, device: str, started: Started) -> None:
        """A device has begun a run."""
        self._working[device].begin(started.run, self._clock())
        if asked := self._asked.get(device):
            asked.runs.append(started.run)
            asked.left_at = None

    def spent(self, device: str, seconds: float) -> None:
        """A device computes for so long without a run: sums for the head, a measurement."""
        self._working[device].add(seconds)

    def lost(self, device: str) -> None:
        """A device has lost the run that it was at."""
        now = self._clock()
        self._working[device].stop(now)
        asked = self._asked.get(device)
        if asked and asked.outcome == LATE:
            asked.outcome, asked.left_at = DROPPED, now

    def declined(self, device: str) -> None:
        """A device cannot do its task."""
        if asked := self._asked.get(device):
            asked.outcome = DECLINED

    def accepted(self, update: UpdateReady) -> None:
        """An update counts."""
        asked = self._asked.get(update.device_id)
        if asked and asked.task.task_id == update.task_id:
            asked.outcome, asked.seconds = COUNTED, self._clock() - asked.since
            asked.gain = _gain(update.stats)
            asked.personal = finite(update.stats.get("personal_accuracy"))

    def closed(self, number: int, cost: Cost, carried: Carried, skipped: int = 0) -> RoundRecord:
        """A round is over, number 0 before it began; its version is not measured yet."""
        now, wall = self._clock(), time.perf_counter()
        taken = {name: working.take(now) for name, working in self._working.items()}
        spent = {name: seconds for name, seconds in taken.items() if seconds or name in self._asked}
        choices = tuple(self._choice(name, asked, spent[name], now) for name, asked in self._asked.items())
        energies = [self._book(name, seconds, now) for name, seconds in spent.items()]
        counted = [choice for choice in choices if choice.outcome == COUNTED]
        told = [asked.personal for asked in self._asked.values() if asked.personal is not None]
        peaks = [choice.peak_mb for choice in choices if choice.peak_mb]
        record = RoundRecord(
            round=number,
            time_s=now,
            personal_accuracy=sum(told) / len(told) if told else None,
            devices=len(counted),
            skipped=skipped,
            bytes_up=cost.bytes_up,
            bytes_down=cost.bytes_down,
            up=carried.up,
            down=carried.down,
            compute_s=sum(spent.values()),
            energy_j=sum(energies),
            peak_mb=max(peaks, default=0.0),
            peak_mb_mean=sum(peaks) / len(peaks) if peaks else 0.0,
            wall_s=wall - self._wall,
            choices=choices,
        )
        self.device_rounds += len(counted)
        self._wall = wall
        self._asked.clear()
        return record

    def devices(
        self, bytes_of: Callable[[str], tuple[int, int]], carried: Mapping[str, Carried]
    ) -> list[DeviceRecord]:
        """All devices; ``bytes_of`` a name gives (up, down) at its own link, ``carried`` has what the aggregator counted."""
        nothing = Carried()
        return [
            self._device(spec, *bytes_of(spec.name), carried.get(spec.name, nothing))
            for spec in self._specs.values()
        ]

    def _choice(self, name: str, asked: _Asked, compute_s: float, now: float) -> Choice:
        return Choice(
            device=name,
            profile=self._specs[name].profile_name,
            policy=named(asked.task.work.policy),
            reason=getattr(asked.task, "reason", ""),
            outcome=asked.outcome,
            seconds=now - asked.since if asked.seconds is None else asked.seconds,
            compute_s=compute_s,
            peak_mb=asked.peak_mb,
            gain=asked.gain,
        )

    def _book(self, name: str, compute_s: float, now: float) -> float:
        """Add a round to a device's sums; returns its joules: of one that was asked, also those of waiting while it was there."""
        sums, asked = self._sums[name], self._asked.get(name)
        total_s = 0.0 if asked is None else (now if asked.left_at is None else asked.left_at) - asked.since
        spent = energy_j(self._specs[name].profile, active_s=compute_s, total_s=total_s)
        sums.compute_s += compute_s
        sums.energy_j += spent
        if asked:
            sums.rounds += asked.outcome == COUNTED
            sums.peak_mb = max(sums.peak_mb, asked.peak_mb)
        return spent

    def _device(self, spec: DeviceSpec, bytes_up: int, bytes_down: int, carried: Carried) -> DeviceRecord:
        sums = self._sums[spec.name]
        return DeviceRecord(
            device=spec.name,
            profile=spec.profile_name,
            samples=spec.samples,
            classes=spec.classes,
            rounds=sums.rounds,
            compute_s=sums.compute_s,
            bytes_up=bytes_up,
            bytes_down=bytes_down,
            up=carried.up,
            down=carried.down,
            energy_j=sums.energy_j,
            peak_mb=sums.peak_mb,
        )


class WatchedLedger(Ledger):
    """A real ledger that tells what it keeps."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        on_tasks: Callable[[tuple[Task, ...]], object],
        on_update: Callable[[UpdateReady], object],
        on_version: Callable[[int, bytes], object],
    ) -> None:
        """Open; ``on_version`` is told of each version, and its adapter file."""
        super().__init__(folder, settings)
        self._on_tasks, self._on_update, self._on_version = on_tasks, on_update, on_version

    def enrol(self, tasks: Iterable[Task]) -> None:
        """As the ledger, and tell."""
        tasks = tuple(tasks)
        super().enrol(tasks)
        self._on_tasks(tasks)

    def accept_all(self, arrived: Sequence[Arrival]) -> None:
        """As the ledger, and tell."""
        super().accept_all(arrived)
        for one in arrived:
            self._on_update(one.update)

    def add_version(
        self,
        version: int,
        content: bytes,
        *,
        round_number: int,
        state: bytes = b"",
        marks: Iterable[Mark] = (),
    ) -> None:
        """As the ledger, and tell."""
        super().add_version(version, content, round_number=round_number, state=state, marks=marks)
        self._on_version(version, content)


def named(policy: PolicySpec) -> str:
    """A policy in a few words: ``suffix 0.5``."""
    settings = [policy.shape] if policy.shape != "uniform" else []
    return " ".join([policy.name, *([f"{policy.drop:g}"] if policy.drop else []), *settings])


def _gain(stats: Mapping[str, float]) -> float | None:
    after, before = stats.get("held_accuracy_after"), stats.get("held_accuracy_before")
    return None if after is None or before is None else finite(after - before)
