"""``fleetune simulate``: a fleet on one machine under a virtual clock, with everything real but sockets and time."""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleetune.broker.job import Settings
from fleetune.broker.laws import lawful_settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.tasks import Task as Assigned
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.arrays import parse_arrays
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.run_file import ADAPTER, LEDGER, RUN
from fleetune.device_runtime.contracts.wire import FULL, Report
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns
from fleetune.toolkit.simulation.availability import back_at, dropout, is_there, leaves_at, pause
from fleetune.toolkit.simulation.bench import Datasets
from fleetune.toolkit.simulation.book import Book, WatchedLedger
from fleetune.toolkit.simulation.charts import draw_run
from fleetune.toolkit.simulation.clock import Alarms
from fleetune.toolkit.simulation.config import SimulationConfig, load_config
from fleetune.toolkit.simulation.config_copy import config_text
from fleetune.toolkit.simulation.costs import Costs, Measure, Stopwatch
from fleetune.toolkit.simulation.desks import Desk, Equipment, Started
from fleetune.toolkit.simulation.fleet import DeviceSpec, fleet_of, test_share
from fleetune.toolkit.simulation.jobs import Task
from fleetune.toolkit.simulation.journal import JOURNAL, Journal
from fleetune.toolkit.simulation.members import Aggregator, Place, VirtualDevice
from fleetune.toolkit.simulation.profiles import slowdown
from fleetune.toolkit.simulation.records import (
    DEVICES,
    ROUNDS,
    RoundRecord,
    SimulationReport,
    append,
    finite,
    read_report,
    write_lines,
    write_report,
)
from fleetune.toolkit.simulation.runs import Begun, Runs
from fleetune.toolkit.simulation.workers import Inline, Workers, processes

CONFIG, TIMINGS = "config.toml", "timings.json"
_ANY_TIME = ("workers", "timings", "rounds")
"""Settings that make no other simulation: what was done of it before is used again."""
_CACHE_MB = 4096.0
_AWAY_S = 600.0
"""Where rounds have no deadline, a device that vanished is back after this time at the latest."""
_STALLED_S = 30 * 24 * 3600.0
"""A round that is open for longer is never closed."""
_EVALUATOR = "simulator"
"""Who reports measurements, in the ledger."""


class Progress(NamedTuple):
    """Where a simulation stands."""

    round: int
    rounds: int
    time_s: float
    """Virtual."""
    accuracy: float | None


def simulate(
    config: Path | str,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    workers: int | None = None,
    ray: str = "",
    set: Sequence[str] = (),
    charts: bool = True,
    measure: Measure | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    on_note: Callable[[str], object] | None = None,
) -> SimulationReport:
    """Train with a fleet of virtual devices.

    The same arguments after a kill replay the simulation, and do nothing again that was done: the outcome is that of one that was
    not disturbed, bit for bit.

    Args:
        config: TOML file; see ``docs/simulation.md``.
        out: folder for the records, the ledger and the adapter; by default NAME-SEED here.
        resume: there has to be something to go on with.
        workers: processes; None for what the file says, and 0 there for one a core.
        ray: address of a Ray cluster that does the work in their place, ``local`` for one of this machine.
        set: ``key=value`` over the file.
        charts: draw the run where matplotlib is installed.
        measure: how steps are timed, by default with the real engine; for tests.
        on_progress: told of each round.
        on_note: told in a line what is no progress.

    Raises:
        ConfigError: the configuration is wrong, or ``out`` holds something else.
        ArtifactError, DataError: the artifact or the data are.
        StateError: ``out`` cannot be used.
    """
    wanted = load_config(config, set)
    folder = Path(out) if out else Path(f"{wanted.name}-{wanted.seed}")
    artifact = open_artifact(wanted.artifact)
    settings = lawful_settings(artifact, wanted.job, work=wanted.work, patience=wanted.patience)
    _check_folder(folder, must_go_on=resume)
    datasets = Datasets(Path(wanted.artifact))
    specs = fleet_of(wanted, datasets.whole(wanted.data.train, wanted.work.seq_len))
    _check_fleet(wanted, settings, specs)
    with ExitStack() as stack:
        journal = Journal(folder, _digest(wanted, artifact, datasets))
        stack.callback(journal.close)
        if found := _finished(folder, wanted):
            (on_note or (lambda _: None))(f"{folder}: all of its {found.rounds} rounds were done before")
            return found
        team = stack.enter_context(_workers(wanted, workers, ray))
        costs = stack.enter_context(_costs(wanted, folder, artifact, datasets, team, measure))
        with doing("written", folder):
            _begin(folder, wanted)
        world = _World(
            wanted,
            settings,
            artifact,
            specs,
            folder=folder,
            runs=Runs(team, journal),
            costs=costs,
            datasets=datasets,
        )
        stack.callback(world.close)
        report = world.run(on_progress or (lambda _: None))
    if charts and find_spec("matplotlib"):
        draw_run(folder)
    return report


class _World:
    """One simulation: who takes part, the clock, and what comes of it."""

    def __init__(
        self,
        config: SimulationConfig,
        settings: Settings,
        artifact: Artifact,
        specs: Sequence[DeviceSpec],
        *,
        folder: Path,
        runs: Runs,
        costs: Costs,
        datasets: Datasets,
    ) -> None:
        self._config, self._artifact, self._folder, self._runs = config, artifact, folder, runs
        self._began = time.perf_counter()
        self._server = Loopback()
        self._turns = Turns(self._server)
        self._alarms = Alarms(self._server, self._turns)
        self._vanished: dict[str, VirtualDevice] = {}
        self._drawn: dict[str, int] = {}
        """The round in which each device was last drawn to vanish: it does so once in a round."""
        self._pending: deque[tuple[RoundRecord, Begun | None]] = deque()
        self._history: list[RoundRecord] = []
        self._closed_at = 0.0
        self._say: Callable[[Progress], object] = lambda _: None
        self._book = Book(specs, self._now)
        self._test = test_share(config, datasets.whole(config.data.test, config.work.seq_len))
        self._devices: dict[str, VirtualDevice] = {}
        self._ledger = WatchedLedger(
            folder, settings, on_tasks=self._asked, on_update=self._book.accepted, on_version=self._closed
        )
        self._service = self._aggregate(settings)
        equipment = Equipment(artifact, runs, costs, datasets.of, self._now)
        place = Place(self._server, self._turns, FirstAdapter.of(artifact.adapter()))
        self._devices |= {
            spec.name: self._device(spec, place, equipment, costs) for spec in specs if spec.samples
        }

    def close(self) -> None:
        self._ledger.close()

    def run(self, say: Callable[[Progress], object]) -> SimulationReport:
        self._say = say
        self._write_due(all_of_them=False)
        for spec_device in self._devices.values():
            self._come(spec_device, 0.0)
        if not self._turns.run(self._is_over) or not self._service.finished:
            raise ConfigError(
                f"round {self._service.federation.round}: nothing has come of it in {self._now() - self._closed_at:.0f} virtual "
                f"seconds, and nothing will: look at clients, min_clients, availability and patience"
            )
        self._write_due(all_of_them=True)
        return self._conclude()

    def _is_over(self) -> bool:
        return self._service.finished or self._now() - self._closed_at > _STALLED_S

    def _now(self) -> float:
        return self._turns.now

    def _aggregate(self, settings: Settings) -> Service:
        link = self._server.connect(topics(settings.job), will=will(settings.job, "simulation"))
        service = Service(
            link,
            self._ledger,
            settings,
            patience=self._config.patience,
            adapter=self._artifact.adapter(),
            session="simulation",
            now=0.0,
        )
        self._turns.join(link, Aggregator(link, service))
        return service

    def _device(self, spec: DeviceSpec, place: Place, equipment: Equipment, costs: Costs) -> VirtualDevice:
        factor = slowdown(spec.profile, 1.0 if spec.profile.slowdown else costs.gflops())
        desk = Desk(
            equipment,
            spec.name,
            spec.share,
            num_samples=spec.samples,
            slowdown=factor,
            hidden_cache_mb=_CACHE_MB if self._config.cache.hidden_cache else 0.0,
            pause_s=partial(self._pause_s, spec.number),
            on_start=partial(self._book.started, spec.name),
            on_known=partial(self._known, spec),
        )
        identity = Identity(spec.name, self._config.job.job, self._artifact.digest)
        return VirtualDevice(place, identity, desk, line=spec.line, on_event=partial(self._heard, spec.name))

    def _pause_s(self, number: int, round_number: int) -> float:
        found = pause(
            self._config.availability, seed=self._config.seed, device=number, round_number=round_number
        )
        return found.seconds if found else 0.0

    def _known(self, spec: DeviceSpec, started: Started) -> None:
        """The end of a run is known: and so is when the device vanishes, if it does."""
        number, rules = started.work.rounds_before + 1, self._config.availability
        found = dropout(rules, seed=self._config.seed, device=spec.number, round_number=number)
        if found and self._drawn.get(spec.name) != number:
            self._drawn[spec.name] = number
            run = started.run
            at = run.begins_at + found.at * (run.ends_at - run.begins_at)
            self._alarms.at(at, partial(self._vanish, spec.name, started))

    def _heard(self, device: str, event: Event) -> None:
        if event.kind == "declined":
            self._book.declined(device)

    def _vanish(self, name: str, started: Started, now: float) -> None:
        """A device is gone, if it is still at the run that this was drawn for: until the round is over, or long past."""
        device = self._devices[name]
        if device.is_there and device.desk.current is started:
            self._vanished[name] = device
            self._lose(device, now)
            self._alarms.at(now + (self._config.patience.deadline_s or _AWAY_S), partial(self._come, device))

    def _lose(self, device: VirtualDevice, now: float) -> None:
        if device.desk.ends_at > now:
            self._book.lost(device.identity.device_id)
        device.leave(now)

    def _come(self, device: VirtualDevice, now: float) -> None:
        """A device arrives, if this is a time at which it is there, and leaves when that is over."""
        rules, seed = self._config.availability, self._config.seed
        number = int(device.identity.device_id.rpartition("-")[2])
        if not is_there(rules, now, seed=seed, device=number):
            self._alarms.at(back_at(rules, now, seed=seed, device=number), partial(self._come, device))
            return
        self._vanished.pop(device.identity.device_id, None)
        device.arrive(now)
        self._alarms.at(leaves_at(rules, now, seed=seed, device=number), partial(self._go, device))

    def _go(self, device: VirtualDevice, now: float) -> None:
        self._lose(device, now)
        self._come(device, now)

    def _asked(self, tasks: Sequence[Assigned]) -> None:
        """Have all devices of a round begin at once, where it is known from which adapter."""
        self._book.enrolled(tasks)
        if self._config.job.down_codec != FULL:
            return
        for task in tasks:
            if not getattr(task.work, "personal", 0):
                start = parse_arrays(self._ledger.version(task.version))
                self._devices[task.device_id].desk.begin_ahead(task.work, start)

    def _closed(self, version: int, content: bytes) -> None:
        """A version is made, 0 before the first round: have it measured, and bring back who vanished."""
        self._closed_at = self._now()
        cost = self._ledger.cost(version)
        record = self._book.closed(version, bytes_up=cost.bytes_up, bytes_down=cost.bytes_down)
        job = self._config.job
        is_due = version % job.evaluate_every == 0 or version == job.rounds
        self._pending.append((record, self._measure(content) if is_due else None))
        for device in list(self._vanished.values()):
            self._come(device, self._now())
        self._vanished.clear()
        if version:  # before there is a service, it would take a report for that of an evaluating device
            self._write_due(all_of_them=False)

    def _measure(self, content: bytes) -> Begun:
        return self._runs.begin(
            Task(
                kind="evaluate", device=_EVALUATOR, share=self._test, work=self._config.work, adapter=content
            )
        )

    def _write_due(self, *, all_of_them: bool) -> None:
        """Write the rounds, in their order, whose versions are measured."""
        while self._pending:
            record, begun = self._pending[0]
            if begun and not begun.is_done and not all_of_them:
                return
            self._pending.popleft()
            self._write(record, begun)

    def _write(self, record: RoundRecord, begun: Begun | None) -> None:
        if begun:
            done = begun.wait().check()
            record = msgspec.structs.replace(record, accuracy=finite(done.accuracy), loss=finite(done.loss))
            self._ledger.report(
                Report(
                    device_id=_EVALUATOR,
                    job=self._config.job.job,
                    task_id=f"evaluate-{record.round}-{_EVALUATOR}",
                    round=record.round,
                    version=record.round,
                    loss=done.loss,
                    accuracy=done.accuracy,
                    num_samples=done.num_samples,
                )
            )
        self._history.append(msgspec.structs.replace(record, choices=()))
        append(self._folder / ROUNDS, record)
        self._say(Progress(record.round, self._config.rounds, record.time_s, record.accuracy))

    def _conclude(self) -> SimulationReport:
        manifest, ledger = self._artifact.manifest, self._ledger
        save_peft(self._folder / ADAPTER, manifest, parse_arrays(ledger.version(ledger.newest)))
        for device in self._devices.values():
            device.leave(self._now())
        records = self._book.devices(self._bytes_of)
        write_lines(self._folder / DEVICES, records)
        report = self._report()
        write_report(self._folder, self._artifact, self._config, report)
        return report

    def _bytes_of(self, name: str) -> tuple[int, int]:
        device = self._devices.get(name)
        return (device.bytes_up, device.bytes_down) if device else (0, 0)

    def _report(self) -> SimulationReport:
        history = self._history
        measured = [record for record in history if record.accuracy is not None]
        return SimulationReport(
            name=self._config.name,
            seed=self._config.seed,
            rounds=history[-1].round,
            finished=True,
            devices=len(self._devices),
            accuracy=measured[-1].accuracy if measured else None,
            loss=measured[-1].loss if measured else None,
            time_s=history[-1].time_s,
            compute_s=sum(record.compute_s for record in history),
            bytes_up=sum(record.bytes_up for record in history),
            bytes_down=sum(record.bytes_down for record in history),
            energy_j=sum(record.energy_j for record in history),
            peak_mb=max(record.peak_mb for record in history),
            device_rounds=self._book.device_rounds,
            wall_s=time.perf_counter() - self._began,
            adapter=str(self._folder / ADAPTER),
        )


def _digest(config: SimulationConfig, artifact: Artifact, datasets: Datasets) -> str:
    """Of all that a simulation is a function of."""
    said = msgspec.to_builtins(config, enc_hook=str)
    kept = {
        name: value for name, value in said.items() if name not in (*_ANY_TIME, "artifact", "data", "job")
    }
    job = {name: value for name, value in said["job"].items() if name not in _ANY_TIME}
    limits = (config.data.limit_train, config.data.limit_test)
    data = [
        datasets.whole(path, config.work.seq_len).digest for path in (config.data.train, config.data.test)
    ]
    return sha256(msgspec.json.encode((kept, job, limits, artifact.digest, data), order="sorted")).hexdigest()


def _check_fleet(config: SimulationConfig, settings: Settings, specs: Sequence[DeviceSpec]) -> None:
    count = sum(spec.samples > 0 for spec in specs)
    if count < settings.min_clients:
        raise ConfigError(
            f"{count} of {len(specs)} devices have samples; a round needs at least {settings.min_clients}: look at clients, "
            "job.min_clients and partition"
        )


def _check_folder(folder: Path, *, must_go_on: bool) -> None:
    has_journal = (folder / JOURNAL).exists()
    if must_go_on and not has_journal:
        raise ConfigError(f"{folder}: no simulation lies there to go on with")
    foreign = [name for name in (RUN, ADAPTER, LEDGER) if (folder / name).exists()]
    if foreign and not has_journal:
        raise ConfigError(f"{folder}: {', '.join(foreign)} of another command lie there; give another --out")


def _finished(folder: Path, config: SimulationConfig) -> SimulationReport | None:
    if not (folder / RUN).exists():
        return None
    report = read_report(folder)
    return report if report.finished and report.rounds >= config.rounds else None


def _begin(folder: Path, config: SimulationConfig) -> None:
    """Clear away what is made anew, and keep the configuration."""
    for name in (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", ROUNDS, DEVICES, RUN):
        (folder / name).unlink(missing_ok=True)
    for name in ("versions", "updates", "replicas", ADAPTER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / CONFIG).write_text(config_text(config), encoding="utf-8")


@contextmanager
def _workers(config: SimulationConfig, count: int | None, ray: str) -> Iterator[Workers]:
    team = _team(Path(config.artifact), config.workers if count is None else count, ray)
    try:
        yield team
    finally:
        team.close()


def _team(artifact_dir: Path, count: int, ray: str) -> Workers:
    """Workers of the kind that was asked for; of one alone this process is it."""
    if ray:
        from fleetune.toolkit.simulation.ray_workers import RayWorkers  # an extra

        return RayWorkers(artifact_dir, ray, count or None)
    count = count or len(os.sched_getaffinity(0))
    return processes(artifact_dir, count) if count > 1 else Inline(artifact_dir)


@contextmanager
def _costs(
    config: SimulationConfig,
    folder: Path,
    artifact: Artifact,
    datasets: Datasets,
    team: Workers,
    measure: Measure | None,
) -> Iterator[Costs]:
    path = Path(config.timings) if config.timings else folder / TIMINGS
    train = datasets.whole(config.data.train, config.work.seq_len)
    watch = Stopwatch(artifact, train, batch_size=config.work.batch_size, settle=team.settle)
    try:
        yield Costs(path, artifact, measure or watch)
    finally:
        watch.close()
