"""``fleetune doctor``: looks a device over before, or because, it does not work; one line each, with the remedy."""

import logging
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.agent.identity import Duty, Identity
from fleetune.device_runtime.commands.doctor_server import check_server
from fleetune.device_runtime.commands.findings import FAIL, OK, WARN, Finding
from fleetune.device_runtime.commands.inspect import inspect
from fleetune.device_runtime.commands.own_folder import folder_of
from fleetune.device_runtime.commands.sign import check_signed
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.software import software
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.engine.processor import OTHER, int8_path
from fleetune.device_runtime.errors import ConfigError, FleetuneError, StateError
from fleetune.device_runtime.files import alone_in
from fleetune.device_runtime.network.address import Reach, parse_url
from fleetune.device_runtime.network.expiry import expiry_warning
from fleetune.device_runtime.network.signing import Trust, trusted_of
from fleetune.device_runtime.rules.rules import Rules, reasons
from fleetune.device_runtime.rules.rules_file import load_rules
from fleetune.device_runtime.rules.sensors import Sensors, sensors_of
from fleetune.device_runtime.terms.terms import Terms

log = logging.getLogger(__name__)

_LEAST_DISK, _LITTLE_DISK = 20e6, 500e6
"""Bytes free: an update and a checkpoint hardly fit; no artifact does."""
_LITTLE_MEMORY_MB = 256.0
_HOT_C = 80.0
"""Most boards slow down from here on."""
_YEAR_MIN = 2024


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; ``ok`` unless something fails."""

    ok: bool
    findings: list[Finding]


def doctor(
    artifact_dir: Path | str | None = None,
    *,
    data: Path | str | None = None,
    mqtt: str = "",
    job: str = "",
    id: str | None = None,
    state: Path | str | None = None,
    columns: Columns = Columns(),
    sequences: Sequences = Sequences(),
    duty: Duty = Duty(),
    resources: Resources = Resources(),
    reach: Reach = Reach(),
    rules: Mapping[str, Any] | Path | str | None = None,
    terms: Terms = Terms(),
    trust: Trust = Trust(),
    root: Path | str = "/",
    on_finding: Callable[[Finding], object] | None = None,
) -> Diagnosis:
    """Look this device over. Nothing is changed, and no running device is disturbed.

    Args:
        artifact_dir: folder made by ``fleetune export``; without it what needs one is left out.
        data: as of ``device``; looked for, not read.
        mqtt: URL of the MQTT server; without it the network is left out.
        job: name of the job.
        id: as of ``device``.
        state: as of ``device``.
        columns: as of ``device``; not looked at.
        sequences: as of ``device``; not looked at.
        duty: as of ``device``; not looked at.
        resources: whose memory budget is compared with what is free.
        reach: how the MQTT server is reached.
        rules: when the device may work: what would forbid it now is told.
        terms: as of ``device``; not looked at.
        trust: the keys of which one must have signed the artifact.
        root: folder in which ``proc`` and ``sys`` are found.
        on_finding: told of each finding as it is made.
    """
    found: list[Finding] = []

    def take(findings: Iterator[Finding]) -> None:
        for finding in findings:
            found.append(finding)
            if on_finding:
                on_finding(finding)

    system = Path(root)
    folder = folder_of(state, job=job or "JOB", device_id=id)
    artifact = _Opened(artifact_dir, trust)
    take(_software())
    take(_processor(system))
    take(artifact.findings())
    take(_memory(system, artifact.opened, resources))
    take(_disk(folder))
    take(_clock(system, artifact.opened, reach))
    take(_temperature(system))
    take(_rules(rules))
    take(_data(data))
    if mqtt:
        take(_network(mqtt, job, reach, folder=folder, device_id=id, artifact=artifact.opened))
    return Diagnosis(ok=all(finding.level != FAIL for finding in found), findings=found)


def _software() -> Iterator[Finding]:
    yield Finding("python", OK, f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("fleetune", OK, software() or "not installed, run from its folder")
    missing = [name for name in ("onnxruntime", "tokenizers") if find_spec(name) is None]
    if missing:
        yield Finding("libraries", FAIL, f"no {' and no '.join(missing)}", "pip install 'fleetune[device]'")
    else:
        yield Finding(
            "libraries", OK, f"onnxruntime {_version('onnxruntime')}, tokenizers {_version('tokenizers')}"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "of a build that says no version"


def _processor(root: Path) -> Iterator[Finding]:
    cores, path = len(os.sched_getaffinity(0)), int8_path(root)
    if path == OTHER:
        remedy = "--base-dtype fp32 or fp16 at export is no slower here; `fleetune selfcheck` tells whether int8 is right"
        yield Finding("processor", WARN, f"{cores} cores; no instructions for int8 are listed", remedy)
    else:
        yield Finding("processor", OK, f"{cores} cores; int8 by {path}")


def _memory(root: Path, artifact: Artifact | None, resources: Resources) -> Iterator[Finding]:
    free_mb = _meminfo_mb(root, "MemAvailable")
    if free_mb is None:
        yield Finding("memory", WARN, f"{root / 'proc/meminfo'} cannot be read", "look with `free -m`")
        return
    said = f"{free_mb:.0f} MB free of {_meminfo_mb(root, 'MemTotal') or 0:.0f}"
    need_mb = _least_mb(artifact)
    budget_mb = resources.memory_budget_mb
    if need_mb and free_mb < need_mb:
        remedy = "close other programs, or export a smaller model, or with --base-dtype int8"
        yield Finding(
            "memory", FAIL, f"{said}; the artifact's smallest step takes about {need_mb:.0f}", remedy
        )
    elif budget_mb and free_mb < budget_mb:
        yield Finding("memory", WARN, f"{said}; --memory-budget-mb is {budget_mb:g}", "lower it")
    elif free_mb < _LITTLE_MEMORY_MB:
        yield Finding("memory", WARN, said, "give --memory-budget-mb, and see docs/device-memory.md")
    else:
        yield Finding(
            "memory", OK, said + (f"; the smallest step takes about {need_mb:.0f}" if need_mb else "")
        )


def _meminfo_mb(root: Path, name: str) -> float | None:
    """A line of ``/proc/meminfo``, in 10^6 bytes; None if it is not there."""
    try:
        return int((root / "proc/meminfo").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6
    except (OSError, IndexError, ValueError):
        return None


def _least_mb(artifact: Artifact | None) -> float:
    """Expected peak of the smallest step that `inspect` knows, 10^6 bytes; 0 where none is known."""
    if artifact is None:
        return 0.0
    return min((estimate.peak_mb for estimate in inspect(artifact.folder).estimates), default=0.0)


def _disk(folder: Path) -> Iterator[Finding]:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    said = f"{free / 1e6:.0f} MB free in {there}"
    if not os.access(there, os.W_OK):
        yield Finding(
            "disk", FAIL, f"{there} cannot be written by this user", "give --state a folder of its own"
        )
    elif free < _LEAST_DISK:
        yield Finding(
            "disk",
            FAIL,
            said,
            f"make room, or give --state on another disk; at least {_LEAST_DISK / 1e6:.0f} MB",
        )
    elif free < _LITTLE_DISK:
        yield Finding(
            "disk", WARN, said, "a streamed model and the hidden cache need more; see docs/device-memory.md"
        )
    else:
        yield Finding("disk", OK, said)


def _clock(root: Path, artifact: Artifact | None, reach: Reach) -> Iterator[Finding]:
    now = datetime.now(timezone.utc)
    said = f"{now:%Y-%m-%d %H:%M:%S} UTC"
    made = artifact and datetime.fromtimestamp(artifact.folder.stat().st_mtime, timezone.utc)
    if now.year < _YEAR_MIN or (made and now < made):
        remedy = "set it, and let systemd-timesyncd or chrony keep it: certificates are judged by it"
        yield Finding("clock", FAIL, f"{said}: it is behind", remedy)
    elif (root / "run/systemd").is_dir() and not (root / "run/systemd/timesync/synchronized").exists():
        yield Finding(
            "clock",
            WARN,
            f"{said}; systemd has not set it",
            "timedatectl set-ntp true, unless chrony or ntpd does it",
        )
    else:
        yield Finding("clock", OK, said)
    if reach.cert and (warning := expiry_warning(Path(reach.cert), now)):
        yield Finding("certificate", WARN, warning, "`fleetune authority sign DIR REQUEST --renew`")


def _temperature(root: Path) -> Iterator[Finding]:
    reading = Sensors(root, wanted=("temperature",)).read()
    if reading.temperature is None:
        remedy = 'a temperature rule is left out here, or forbids all work if it says on_missing = "deny"'
        yield Finding("temperature", WARN, reading.doubts.get("temperature", "no sensor"), remedy)
    elif reading.temperature >= _HOT_C:
        yield Finding(
            "temperature",
            WARN,
            f"{reading.temperature:.0f} C",
            "cool it, or give a temperature rule: docs/device-rules.md",
        )
    else:
        yield Finding("temperature", OK, f"{reading.temperature:.0f} C")


def _rules(rules: Mapping[str, Any] | Path | str | None) -> Iterator[Finding]:
    try:
        table: Rules = load_rules(rules)
    except FleetuneError as exc:
        yield Finding("rules", FAIL, str(exc), "docs/device-rules.md has all of them")
        return
    if not table.asked:
        return
    shut = reasons(table, sensors_of(table).read(), held={})
    if shut:
        yield Finding(
            "rules", WARN, f"it would pause now: {'; '.join(shut.values())}", "wait, or change the rule"
        )
    else:
        yield Finding("rules", OK, f"{', '.join(table.asked)}: it may work now")


def _data(data: Path | str | None) -> Iterator[Finding]:
    if data and not os.access(data, os.R_OK):
        yield Finding(
            "data", FAIL, f"{data} cannot be read", "give --data a file or folder that this user may read"
        )


class _Opened:
    """The artifact, if there is one and it is whole."""

    def __init__(self, folder: Path | str | None, trust: Trust) -> None:
        self._folder, self._trust = folder, trust
        self.opened: Artifact | None = None

    def findings(self) -> Iterator[Finding]:
        """Open it; a damaged one fails."""
        if self._folder is None:
            return
        try:
            artifact = open_artifact(self._folder)
            trusted = trusted_of(self._trust)
            if trusted:
                check_signed(artifact, trusted)
        except FleetuneError as exc:
            remedy = "copy it from the workstation again, and `fleetune selfcheck` it there"
            yield Finding("artifact", FAIL, str(exc), remedy)
            return
        self.opened = artifact
        signed = "signed, " if trusted else ""
        yield Finding(
            "artifact", OK, f"{signed}whole, {artifact.digest[:12]}, base {artifact.manifest.base_dtype}"
        )


def _network(
    mqtt: str, job: str, reach: Reach, *, folder: Path, device_id: str | None, artifact: Artifact | None
) -> Iterator[Finding]:
    if not job:
        yield Finding("job", FAIL, "no job is named", "give --job, as the aggregator has it")
        return
    try:
        name = device_id or _kept_name(folder) or parse_url(mqtt).username or f"doctor-{secrets.token_hex(4)}"
        identity = Identity(name, job, artifact.digest if artifact else "", session=secrets.token_hex(8))
        if folder.is_dir():
            with alone_in(folder, "a device is at work in it"):
                yield from check_server(mqtt, identity, reach)
        else:
            yield from check_server(mqtt, identity, reach)
    except StateError as exc:
        remedy = "that device is connected under its name: see its log, or stop it and ask again"
        yield Finding("server", WARN, f"not looked at: {exc}", remedy)
    except ConfigError as exc:
        yield Finding("server", FAIL, str(exc), "docs/operate.md has addresses, logins and certificates")


def _kept_name(folder: Path) -> str:
    """The name that a device in this folder has been given; empty if none is kept."""
    path = folder / "outbox.sqlite"
    if not path.is_file():
        return ""
    from fleetune.device_runtime.agent.outbox_file import OutboxFile

    try:
        outbox = OutboxFile(path)
    except StateError:
        return ""
    try:
        return (outbox.recall("device_id") or b"").decode("ascii", "replace")
    finally:
        outbox.close()
