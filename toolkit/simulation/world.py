"""One simulation at work: who takes part, under which clock, and what comes of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.accounting import spending_of
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.store import in_all
from fleetune.broker.tasks import Task as Assigned
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.gaussian import SECRET_BYTES, derived
from fleetune.device_runtime.contracts.run_file import ADAPTER
from fleetune.device_runtime.contracts.thresholds import stays
from fleetune.device_runtime.contracts.work import FULL, WHOLE
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns
from fleetune.toolkit.simulation.availability import Interruption, pause
from fleetune.toolkit.simulation.bench import Datasets
from fleetune.toolkit.simulation.book import Book, WatchedLedger
from fleetune.toolkit.simulation.clock import Alarms
from fleetune.toolkit.simulation.comings import Comings
from fleetune.toolkit.simulation.config import SimulationConfig
from fleetune.toolkit.simulation.costs import Costs
from fleetune.toolkit.simulation.desks import Desk, Equipment
from fleetune.toolkit.simulation.fleet import DeviceSpec, test_share
from fleetune.toolkit.simulation.history import EVALUATOR, History, Progress
from fleetune.toolkit.simulation.jobs import Task
from fleetune.toolkit.simulation.members import Aggregator, Place, VirtualDevice
from fleetune.toolkit.simulation.memory import MemoryModel
from fleetune.toolkit.simulation.profiles import slowdown
from fleetune.toolkit.simulation.records import DEVICES, SimulationReport, write_lines, write_report
from fleetune.toolkit.simulation.runs import Begun, Runs
from fleetune.toolkit.simulation.user_code import load_function

_CACHE_MB = 4096.0
_STALLED_S = 30 * 24 * 3600.0
"""A round that is open for longer is never closed."""


class Parts(NamedTuple):
    """What a simulation is made of."""

    config: SimulationConfig
    settings: Settings
    artifact: Artifact
    specs: Sequence[DeviceSpec]
    unable: Mapping[str, str]
    """Devices that can do none of the work, and why: they decline, and go."""
    runs: Runs
    costs: Costs
    memory: MemoryModel
    datasets: Datasets


class World:
    """One simulation."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        *,
        say: Callable[[Progress], object],
        note: Callable[[str], object],
    ) -> None:
        """Begin in an empty ``folder``; ``say`` is told of each round, ``note`` in a line of what else is to be known."""
        self._parts, self._folder, self._note = parts, folder, note
        config, settings = parts.config, parts.settings
        self._began = time.perf_counter()
        self._server = Loopback()
        self._turns = Turns(self._server)
        self._closed_at = 0.0
        self._noted: set[str] = set()
        self._book = Book(parts.specs, self._now)
        code = config.fleet.code
        self._instead = load_function(code, named="fleet.code") if code else _as_it_is
        self._test = test_share(
            config, parts.datasets.whole(config.data.test, config.work.seq_len, config.data.columns)
        )
        self._devices: dict[str, VirtualDevice] = {}
        self._comings = Comings(config, self._devices, Alarms(self._server, self._turns), self._book)
        self._ledger = WatchedLedger(
            folder, settings, on_tasks=self._asked, on_update=self._book.accepted, on_version=self._closed
        )
        self._history = History(folder, self._ledger, job=settings.job, rounds=settings.rounds, say=say)
        self._service = self._aggregate()
        equipment = Equipment(
            parts.artifact, parts.runs, parts.costs, parts.datasets.of, parts.memory, self._now
        )
        place = Place(self._server, self._turns, FirstAdapter.of(parts.artifact.adapter()))
        self._devices |= {
            spec.name: self._device(spec, place, equipment) for spec in parts.specs if spec.samples
        }

    def close(self) -> None:
        """Give the folder back."""
        self._ledger.close()

    def run(self) -> SimulationReport:
        """Simulate, and leave what came of it in the folder; ConfigError if a round never ends."""
        self._history.write(all_of_them=False)
        self._comings.begin()
        if not self._turns.run(self._is_over) or not self._is_done:
            raise ConfigError(
                f"round {self._service.federation.round}: nothing has come of it in {self._now() - self._closed_at:.0f} virtual "
                f"seconds, and nothing will: look at clients, min_clients, availability and patience"
            )
        self._history.write(all_of_them=True)
        return self._conclude()

    @property
    def _is_done(self) -> bool:
        """Whether all rounds are closed, or the last one that may begin."""
        return self._service.finished or 0 < self._parts.config.until_s <= self._closed_at

    def _is_over(self) -> bool:
        return self._is_done or self._now() - self._closed_at > _STALLED_S

    def _now(self) -> float:
        return self._turns.now

    def _aggregate(self) -> Service:
        settings, artifact = self._parts.settings, self._parts.artifact
        link = self._server.connect(topics(settings.job), will=will(settings.job, "simulation"))
        service = Service(
            link,
            self._ledger,
            settings,
            patience=self._parts.config.patience,
            adapter=artifact.adapter(),
            session="simulation",
            now=0.0,
            noise=derived(*self._noise_of("aggregator")),
        )
        self._turns.join(link, Aggregator(link, service))
        return service

    def _device(self, spec: DeviceSpec, place: Place, equipment: Equipment) -> VirtualDevice:
        config, profile = self._parts.config, spec.profile
        factor = slowdown(profile, 1.0 if profile.slowdown else equipment.costs.gflops())
        noise = derived(*self._noise_of(spec.name))(SECRET_BYTES)
        desk = Desk(
            equipment,
            spec.name,
            spec.share,
            num_samples=spec.samples,
            slowdown=factor,
            hidden_cache_mb=_CACHE_MB if config.cache.hidden_cache else 0.0,
            memory_mb=profile.memory_mb,
            pause=partial(self._pause, spec.number),
            on_start=partial(self._book.started, spec.name),
            on_known=partial(self._comings.known, spec),
            on_spent=partial(self._book.spent, spec.name),
            instead=partial(self._instead, spec.number),
            secret=noise,
        )
        identity = Identity(spec.name, config.job.job, equipment.artifact.digest)
        heard = partial(self._heard, spec)
        return VirtualDevice(place, identity, desk, line=spec.line, noise=noise, on_event=heard)

    def _noise_of(self, who: str) -> tuple[bytes, bytes]:
        """What noise follows from: no secret here, or a simulation could not be repeated."""
        return b"simulation %d" % self._parts.config.seed, who.encode()

    def _pause(self, number: int, round_number: int) -> Interruption | None:
        config = self._parts.config
        return pause(config.availability, seed=config.seed, device=number, round_number=round_number)

    def _heard(self, spec: DeviceSpec, event: Event) -> None:
        if event.kind != "declined":
            return
        self._book.declined(spec.name)
        if spec.name in self._parts.unable:
            self._comings.retire(spec.name)
        elif spec.profile_name not in self._noted:
            self._noted.add(spec.profile_name)
            self._note(
                f"profile {spec.profile_name}: {spec.name} declined in round {event.round}: {event.text}"
            )

    def _asked(self, tasks: Sequence[Assigned]) -> None:
        """Have all devices of a round begin at once, where it is known from which adapter."""
        self._book.enrolled(tasks)
        ahead = [
            task
            for task in tasks
            if not (task.work.personal or stays(task.work)) and self._down_codec(task) in (FULL, WHOLE)
        ]
        starts = {task.version: parse_arrays(self._ledger.version(task.version)) for task in ahead[:1]}
        for task in ahead:
            self._devices[task.device_id].desk.begin_ahead(task.work, starts[task.version])

    def _down_codec(self, task: Assigned) -> str:
        return task.plan.down.codec if task.plan and task.plan.down else self._parts.settings.down_codec

    def _closed(self, version: int, content: bytes) -> None:
        """A version is made, 0 before the first round: have it measured, and bring back who vanished."""
        self._closed_at = self._now()
        ledger, job = self._ledger, self._parts.config.job
        cost, carried = ledger.cost(version), in_all(ledger.carried(version))
        record = self._book.closed(version, cost, carried, ledger.figures(version).skipped)
        if spending := spending_of(self._parts.settings.dp, self._parts.settings.work):
            turns = max(ledger.turns(version).values(), default=0)
            record = msgspec.structs.replace(record, epsilon=spending(turns))
        is_due = version % job.evaluate_every == 0 or version == job.rounds
        self._history.add(record, self._measure(content) if is_due else None)
        self._comings.bring_back(self._now())
        if version:  # before there is a service, it would take a report for that of an evaluating device
            self._history.write(all_of_them=False)

    def _measure(self, content: bytes) -> Begun:
        work = self._parts.config.work
        return self._parts.runs.begin(
            Task(kind="evaluate", device=EVALUATOR, share=self._test, work=work, adapter=content)
        )

    def _conclude(self) -> SimulationReport:
        artifact, ledger = self._parts.artifact, self._ledger
        save_peft(self._folder / ADAPTER, artifact.manifest, parse_arrays(ledger.version(ledger.newest)))
        for device in self._devices.values():
            device.leave(self._now())
        write_lines(self._folder / DEVICES, self._book.devices(self._bytes_of, ledger.carried()))
        report = self._history.sums(self._report())
        write_report(self._folder, artifact, self._parts.config, report)
        return report

    def _bytes_of(self, name: str) -> tuple[int, int]:
        device = self._devices.get(name)
        return (device.bytes_up, device.bytes_down) if device else (0, 0)

    def _report(self) -> SimulationReport:
        config = self._parts.config
        return SimulationReport(
            name=config.name,
            seed=config.seed,
            rounds=0,
            finished=True,
            devices=len(self._devices),
            device_rounds=self._book.device_rounds,
            wall_s=time.perf_counter() - self._began,
            adapter=str(self._folder / ADAPTER),
        )


def _as_it_is(number: int, workbench: Workbench) -> Workbench:
    return workbench
