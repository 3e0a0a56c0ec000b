"""``fleetune device``: a device's life in one process, resumed by the same command after a kill."""

import fcntl
import logging
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from device_runtime.agent import Agent, Event, Identity
from device_runtime.arrays import Arrays
from device_runtime.artifact import Artifact, open_artifact
from device_runtime.data import load_dataset
from device_runtime.errors import ConfigError, StateError, TransportError, choices
from device_runtime.evaluation import Evaluation, evaluate
from device_runtime.link import Link, Will
from device_runtime.loopback import send
from device_runtime.memory_plan import RECOMPUTE, SAVE_ALL
from device_runtime.outbox import Outbox
from device_runtime.runtimes import open_stack
from device_runtime.samples import Dataset
from device_runtime.trainer import Trainer
from device_runtime.training import peak_rss_mb
from device_runtime.wire import LocalWork, check_name
from device_runtime.workbench import Workbench

log = logging.getLogger(__name__)

ROLES = ("train", "evaluate")
_NAP_S = 0.1
_DEFAULT_SEQ_LEN = LocalWork().seq_len


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did since its process started."""

    device_id: str
    rounds: int
    """Updates that the aggregator took."""
    refused: int
    """Updates and reports that it did not take, and work that could not be done."""
    evaluations: int
    steps: int
    step_ms_median: float | None
    mean_active_layers: float | None
    bytes_sent: int
    """Payload of all MQTT messages."""
    bytes_received: int
    peak_rss_mb: float
    wall_s: float
    reason: str
    """Why it stopped."""


def device(
    artifact_dir: Path | str,
    *,
    data: Path | str,
    mqtt: str,
    job: str,
    id: str | None = None,
    state: Path | str | None = None,
    role: str = "train",
    threads: int = 0,
    recompute: bool = False,
    ca_file: str | None = None,
    checkpoint_every: int = 20,
    timeout_s: float = 20.0,
    idle_limit_s: float = 0.0,
    on_event: Callable[[Event], object] | None = None,
) -> DeviceReport:
    """Train, or evaluate, for an aggregator until the job is over.

    The same arguments after a kill resume: the outbox and the checkpoint are in ``state``.

    Args:
        artifact_dir: folder made by ``fleetune export``; the aggregator holds the same.
        data: labelled samples; see :func:`device_runtime.data.load_dataset`. They never leave the device.
        mqtt: URL of the MQTT server.
        job: name of the job, as the aggregator has it.
        id: name of this device; by default made once and kept in ``state``.
        state: folder that survives restarts; by default ``~/.fleetune/JOB/ID`` (or ``device`` without an ID).
        role: ``train`` or ``evaluate``.
        threads: for the kernels; 0 for one a core.
        recompute: less memory for one more forward a step.
        ca_file: PEM file of the authorities to trust for ``mqtts`` and ``wss``.
        checkpoint_every: steps between checkpoints.
        timeout_s: longest wait for the MQTT server at the start.
        idle_limit_s: longest wait for a word of the aggregator; 0 for ever.
        on_event: told of offers, results and verdicts.

    Raises:
        ConfigError: an argument is wrong, or the aggregator cannot use this device.
        ArtifactError: the artifact is damaged.
        DataError: the data does not say what it should.
        StateError: the state folder is damaged, or cannot be written.
        TransportError: the server is not there or refuses the login, or the aggregator is silent for too long.
    """
    if role not in ROLES:
        raise ConfigError(f"no role {role!r}; have: {choices(ROLES)}")
    check_name("job", job)
    artifact = open_artifact(artifact_dir)
    folder = _state_folder(state, job=job, device_id=id)
    desk = _Desk(artifact, Path(data), threads=threads, recompute=recompute)
    with desk.stack, _alone_in(folder), Outbox(folder / "outbox.sqlite") as outbox:
        identity = Identity(_device_id(outbox, id), job, artifact.digest, role)
        link = Link(
            mqtt,
            client_id=f"fleetune-{job}-{identity.device_id}",
            topics=identity.topics,
            will=Will(*identity.will),
            ca_file=ca_file,
        )
        tally = _Tally(on_event)
        agent = Agent(
            link,
            outbox,
            desk.workbench(),
            identity=identity,
            folder=folder,
            adapter=artifact.adapter(),
            checkpoint_every=checkpoint_every,
            on_event=tally,
        )
        link.open(timeout_s)
        try:
            _live(agent, link, idle_limit_s=idle_limit_s)
        finally:
            send(link, *identity.will, retain=True)
            link.close()
    if agent.is_unwanted:
        raise ConfigError(f"the aggregator of job {job!r} cannot use this device: {agent.finished}")
    return tally.report(identity.device_id, link=link, reason=agent.finished)


class _Tally:
    """Counts what happens and passes on what a person wants to read."""

    def __init__(self, on_event: Callable[[Event], object] | None) -> None:
        self._on_event = on_event or (lambda _: None)
        self._started = time.monotonic()
        self._kinds: Counter[str] = Counter()
        self._active: list[float] = []
        self._seconds: list[float] = []

    def __call__(self, event: Event) -> None:
        self._kinds[event.kind] += 1
        if event.kind != "step":
            log.info("%s", event)
            self._on_event(event)
            return
        self._active.append(event.values["active_layers"])
        self._seconds.append(event.values["seconds"])

    def report(self, device_id: str, *, link: Link, reason: str) -> DeviceReport:
        kinds = self._kinds
        return DeviceReport(
            device_id=device_id,
            rounds=0 if kinds["evaluated"] else kinds["accepted"],
            refused=kinds["refused"] + kinds["declined"],
            evaluations=kinds["evaluated"],
            steps=kinds["step"],
            step_ms_median=1000 * statistics.median(self._seconds) if self._seconds else None,
            mean_active_layers=statistics.fmean(self._active) if self._active else None,
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            peak_rss_mb=peak_rss_mb(),
            wall_s=time.monotonic() - self._started,
            reason=reason,
        )


class _Desk:
    """The stack and the data of a device; the data is read again when the aggregator asks for another length."""

    def __init__(self, artifact: Artifact, data: Path, *, threads: int, recompute: bool) -> None:
        self.stack = open_stack(artifact, threads=threads, memory=RECOMPUTE if recompute else SAVE_ALL)
        self._artifact, self._data = artifact, data
        self._seq_len, self._dataset = _DEFAULT_SEQ_LEN, self._load(_DEFAULT_SEQ_LEN)

    def workbench(self) -> Workbench:
        return Workbench(self._start, self._evaluate, self._dataset.num_samples)

    def _start(self, work: LocalWork, adapter: Arrays) -> Trainer:
        return Trainer(self.stack, self._rows(work.seq_len), work, adapter)

    def _evaluate(self, work: LocalWork, adapter: Arrays) -> Evaluation:
        return evaluate(self.stack, self._rows(work.seq_len), adapter)

    def _rows(self, seq_len: int) -> Dataset:
        if seq_len != self._seq_len:
            self._seq_len, self._dataset = seq_len, self._load(seq_len)
        return self._dataset

    def _load(self, seq_len: int) -> Dataset:
        return load_dataset(self._data, self._artifact.manifest, self._artifact.folder, seq_len=seq_len)


def _live(agent: Agent, link: Link, *, idle_limit_s: float) -> None:
    busy_at = time.monotonic()
    while not agent.finished:
        now = time.monotonic()
        if agent.poll(now):
            busy_at = time.monotonic()
            continue
        if message := link.receive(_NAP_S):
            agent.take(*message, time.monotonic())
        elif idle_limit_s and now > max(busy_at, agent.heard_at) + idle_limit_s:
            raise TransportError(f"{link.address.shown}: no word of an aggregator for {idle_limit_s:g} s")


def _state_folder(state: Path | str | None, *, job: str, device_id: str | None) -> Path:
    folder = Path(state) if state else Path.home() / ".fleetune" / job / (device_id or "device")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StateError(f"{folder}: cannot be made: {exc.strerror or exc}") from exc
    return folder


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two processes with one identity would throw each other off the server for ever."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            raise StateError(
                f"{folder}: another device process works here; give each its own --state"
            ) from exc
        yield


def _device_id(outbox: Outbox, given: str | None) -> str:
    if given:
        return check_name("device", given)
    kept = outbox.recall("device_id")
    if kept is None:
        kept = f"device-{secrets.token_hex(6)}".encode()
        outbox.remember("device_id", kept)
    return kept.decode()
