"""The folder of a simulation: whether it may be used, what is cleared away, and which simulation it is of."""

import shutil
from hashlib import sha256
from pathlib import Path

import msgspec

from fleetune.broker.jobs.patience import UPLOADS_MB
from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.run_file import ADAPTER, LEDGER, ROUNDS, RUN
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import doing
from fleetune.toolkit.simulation.bench import Datasets
from fleetune.toolkit.simulation.config import SimulationConfig
from fleetune.toolkit.simulation.config_copy import config_text
from fleetune.toolkit.simulation.jobs import told_work
from fleetune.toolkit.simulation.journal import JOURNAL
from fleetune.toolkit.simulation.records import DEVICES, SimulationReport, read_report

CONFIG, TIMINGS = "config.toml", "timings.json"
_ANY_TIME = ("workers", "timings", "rounds", "until_s")
"""Settings that make no other simulation: what was done of it before is used again."""

_NEWER = {
    name: value
    for name, value in msgspec.to_builtins(Job("", rounds=1, clients=1)).items()
    if name in ("weight_cap", "length_cap", "heading", "outliers", "strikes", "dp")
    or name.startswith("secure")
} | {"uploads_mb": UPLOADS_MB}
"""Fields newer than journals on disks, of a job and of its patience, and their defaults: where they differ it is another run."""


_KEEPING = ("keep_versions", "keep_rounds")
"""Of patience what no choice goes by."""


def check_folder(folder: Path, *, must_go_on: bool) -> None:
    """Raise ConfigError if another command's work lies there, or nothing that could be gone on with."""
    has_journal = (folder / JOURNAL).exists()
    if must_go_on and not has_journal:
        raise ConfigError(f"{folder}: no simulation lies there to go on with")
    foreign = [name for name in (RUN, ADAPTER, LEDGER) if (folder / name).exists()]
    if foreign and not has_journal:
        raise ConfigError(f"{folder}: {', '.join(foreign)} of another command lie there; give another --out")


def digest_of(config: SimulationConfig, artifact: Artifact, datasets: Datasets) -> str:
    """Digest of all that a simulation is a function of."""
    said = msgspec.to_builtins(config, enc_hook=str)
    kept = {
        name: value for name, value in said.items() if name not in (*_ANY_TIME, "artifact", "data", "job")
    }
    kept["work"] = told_work(config.work)
    patience = {n: v for n, v in said["patience"].items() if n not in _KEEPING}
    kept["patience"] = {n: v for n, v in patience.items() if _NEWER.get(n) != v}
    kept["fleet"] = {name: value for name, value in said["fleet"].items() if value}
    job = {name: value for name, value in said["job"].items() if name not in _ANY_TIME}
    job = {name: value for name, value in job.items() if _NEWER.get(name) != value}
    limits = (config.data.limit_train, config.data.limit_test)
    data = [
        datasets.whole(path, config.work.seq_len, config.data.columns).digest
        for path in (config.data.train, config.data.test)
    ]
    return sha256(msgspec.json.encode((kept, job, limits, artifact.digest, data), order="sorted")).hexdigest()


def find_finished(folder: Path, config: SimulationConfig) -> SimulationReport | None:
    """Return what came of all the rounds or the time that are asked for, if they were done before."""
    if not (folder / RUN).exists():
        return None
    report = read_report(folder)
    is_all = report.rounds >= config.rounds or 0 < config.until_s <= report.time_s
    return report if report.finished and is_all else None


def begin_folder(folder: Path, config: SimulationConfig) -> None:
    """Clear away what is made anew, and keep the configuration; StateError if that cannot be."""
    with doing("written", folder):
        for name in (LEDGER, f"{LEDGER}-wal", f"{LEDGER}-shm", ROUNDS, DEVICES, RUN):
            (folder / name).unlink(missing_ok=True)
        for name in ("versions", "updates", "replicas", ADAPTER):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CONFIG).write_text(config_text(config), encoding="utf-8")
