"""``fleetune simulate``: a fleet on one machine under a virtual clock, with everything real but sockets and time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.laws import lawful_settings
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import alone_in, doing
from fleetune.device_runtime.options import check
from fleetune.toolkit.simulation.bench import Datasets
from fleetune.toolkit.simulation.charts import draw_run
from fleetune.toolkit.simulation.config import SimulationConfig, load_config
from fleetune.toolkit.simulation.costs import Costs, Measure, Stopwatch
from fleetune.toolkit.simulation.fleet import DeviceSpec, fleet_of, told_of, who_is_unable
from fleetune.toolkit.simulation.history import Progress
from fleetune.toolkit.simulation.journal import Journal
from fleetune.toolkit.simulation.memory import MemoryModel
from fleetune.toolkit.simulation.overhead import time_rounds
from fleetune.toolkit.simulation.records import SimulationReport
from fleetune.toolkit.simulation.run_folder import (
    TIMINGS,
    begin_folder,
    check_folder,
    digest_of,
    find_finished,
)
from fleetune.toolkit.simulation.runs import Runs
from fleetune.toolkit.simulation.workers import Inline, Workers, processes
from fleetune.toolkit.simulation.world import Parts, World

WORKERS_A_CORE = 4
"""More processes would only take turns, and their memory; no result depends on how many there are."""
FIXED = "fixed"
"""The configurator that gives all devices the job's own work."""


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
    note, wanted = on_note or (lambda _: None), load_config(config, set)
    if workers is not None:
        check(msgspec.structs.replace(wanted, workers=workers))
    folder = Path(out) if out else Path(f"{wanted.name}-{wanted.seed}")
    artifact = open_artifact(wanted.artifact)
    settings = lawful_settings(artifact, wanted.job, work=wanted.work, patience=wanted.patience)
    check_folder(folder, must_go_on=resume)
    datasets, memory = Datasets(Path(wanted.artifact)), MemoryModel(artifact)
    specs = fleet_of(wanted, datasets.whole(wanted.data.train, wanted.work.seq_len, wanted.data.columns))
    unable = who_is_unable(specs, wanted.work, memory, datasets.of) if settings.configurator == FIXED else {}
    _check_fleet(settings, specs, unable)
    with ExitStack() as stack:
        with doing("made", folder):
            folder.mkdir(parents=True, exist_ok=True)
        told = "another simulation works here; give each its own --out"
        stack.enter_context(alone_in(folder, told, lock="simulation.lock"))
        journal = Journal(folder, digest_of(wanted, artifact, datasets))
        stack.callback(journal.close)
        if found := find_finished(folder, wanted):
            note(f"{folder}: all of its {found.rounds} rounds were done before")
            return found
        for line in told_of(specs, unable):
            note(line)
        team = stack.enter_context(_workers(wanted, workers, ray))
        costs = stack.enter_context(_costs(wanted, folder, artifact, datasets, team, measure))
        begin_folder(folder, wanted)
        parts = Parts(wanted, settings, artifact, specs, unable, Runs(team, journal), costs, memory, datasets)
        world = World(parts, folder, say=on_progress or (lambda _: None), note=note)
        stack.callback(world.close)
        report = world.run()
    if charts and find_spec("matplotlib"):
        draw_run(folder)
    return report


def _check_fleet(settings: Settings, specs: Sequence[DeviceSpec], unable: Mapping[str, str]) -> None:
    """Raise ConfigError if there are too few devices for a round."""
    with_samples = [spec for spec in specs if spec.samples]
    if with_samples and len(unable) == len(with_samples):
        raise ConfigError(f"no device can do this work: {'; '.join(told_of(specs, unable))}")
    count = len(with_samples) - len(unable)
    if count < settings.min_clients:
        short = f", and memory for the work ({'; '.join(told_of(specs, unable))})" if unable else ""
        raise ConfigError(
            f"{count} of {len(specs)} devices have samples{short}; a round needs at least {settings.min_clients}: look at "
            "clients, job.min_clients and partition"
        )


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
    cores = len(os.sched_getaffinity(0))
    count = min(count, WORKERS_A_CORE * cores) or cores
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
    train = datasets.whole(config.data.train, config.work.seq_len, config.data.columns)
    batch_size = config.work.batch_size
    watch = Stopwatch(artifact, train, batch_size=batch_size, settle=team.settle)
    rounds = None if measure else partial(time_rounds, artifact, train, batch_size=batch_size)
    try:
        yield Costs(path, artifact, measure or watch, rounds=rounds)
    finally:
        watch.close()
