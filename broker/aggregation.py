"""``fleetune aggregate``: one job from its first round to the adapter, resumed by the same command after a kill."""

import logging
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from safetensors.numpy import load

from fleetune.broker.job import Job, Patience, Settings, settings_of
from fleetune.broker.laws import check_settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import Row, rows
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.run_file import plain, write_run
from fleetune.device_runtime.contracts.wire import AggregatorStatus, LocalWork, decode
from fleetune.device_runtime.errors import StateError, WireError
from fleetune.device_runtime.network.address import Reach, parse_url
from fleetune.device_runtime.network.client import Party
from fleetune.device_runtime.network.link import Link, Will
from fleetune.device_runtime.options import check

log = logging.getLogger(__name__)

_POLL_S = 0.1
"""A connection that was lost and stands again is noticed within this time."""
_GOODBYE_S = 15.0


class AggregateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a job came to; every figure counts the restarts in."""

    rounds: int
    accuracy: float | None
    """Of the last version, over the evaluating devices; None without one."""
    loss: float | None
    bytes_down: int
    """Payload of all chunks sent to devices (training and evaluating), repetitions included."""
    bytes_up: int
    """Payload of all chunks received from devices, repetitions included."""
    link_bytes_sent: int
    """Payload of all MQTT messages sent by the aggregator."""
    link_bytes_received: int
    wall_s: float
    adapter: str
    """PEFT folder."""
    history: list[Row]


def aggregate(
    artifact_dir: Path | str,
    *,
    mqtt: str,
    job: Job,
    out: Path | str,
    work: LocalWork = LocalWork(),
    patience: Patience = Patience(),
    reach: Reach = Reach(),
    on_round: Callable[[Row], object] | None = None,
) -> AggregateReport:
    """Combine what devices learn, round by round, into a PEFT adapter.

    The same arguments with an ``out`` that exists resume the job; ``mqtt``, ``patience`` and ``reach`` may differ.

    Args:
        artifact_dir: folder made by ``fleetune export``; the devices hold the same.
        mqtt: URL of the MQTT server.
        job: its name, rounds and clients, and how updates are combined.
        out: folder for ``ledger.sqlite``, ``versions/``, ``adapter/`` and ``run.json``.
        work: what a device does in a round; its seed is made from the job's.
        patience: how long is waited for what.
        reach: how the MQTT server is reached.
        on_round: called with each row of ``history``, in order, when it is complete.

    Raises:
        ConfigError: a setting is wrong (all listed), or ``out`` holds another job.
        ArtifactError: the artifact is damaged.
        StateError: the ledger is damaged, or cannot be written.
        TransportError: the server is not there or refuses the login, or a round never gets enough updates.
    """
    arguments = plain(locals()) | {"mqtt": parse_url(mqtt).shown}  # a login is not for run.json
    artifact = open_artifact(artifact_dir)
    settings = settings_of(job, artifact=artifact.digest, work=work)
    check(reach)
    check_settings(settings, patience, num_layers=artifact.manifest.num_layers)
    session = secrets.token_hex(8)
    link = Link(
        mqtt,
        client_id=f"fleetune-aggregator-{job.job}",
        topics=topics(job.job),
        will=Will(*will(job.job, session)),
        ca_file=reach.ca_file or None,
        cert=reach.cert or None,
        key=reach.key or None,
        party=_party(job.job, session),
    )
    with _open_ledger(Path(out), settings) as ledger:
        link.open(reach.timeout_s)
        try:
            service = Service(
                link,
                ledger,
                settings,
                patience=patience,
                adapter=artifact.adapter(),
                session=session,
                now=time.monotonic(),
                on_row=on_round,
            )
            _serve(service, link)
        finally:
            link.close()
        try:
            return _conclude(ledger, artifact, arguments)
        except OSError as exc:
            raise StateError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


def _party(job: str, session: str) -> Party:
    return Party(
        denied=f"the aggregator's user must be let read and write fleetune/v1/{job}/#",
        taken=f"another aggregator works on job {job!r}; stop one of them, or give each its own --job",
        is_other=partial(_is_of_another, session=session),
    )


def _is_of_another(payload: bytes, *, session: str) -> bool:
    """Whether a status under the aggregator's topic says that another process is online there."""
    try:
        status = decode(payload)
    except WireError:
        return False
    return isinstance(status, AggregatorStatus) and status.online and status.session != session


def _open_ledger(out: Path, settings: Settings) -> Ledger:
    try:
        return Ledger(out, settings)
    except OSError as exc:
        raise StateError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


def _serve(service: Service, link: Link) -> None:
    try:
        service.tick(time.monotonic())
        while not service.finished:
            if message := link.receive(_POLL_S):
                service.take(*message, time.monotonic())
            if service.due_at(now := time.monotonic()) <= now:
                service.tick(now)
        _see_off(service, link)
    finally:
        service.stop(time.monotonic())


def _see_off(service: Service, link: Link) -> None:
    """Make sure that the news of the end reach the server, though it may be restarting."""
    deadline = time.monotonic() + _GOODBYE_S
    while not (link.connected and link.flush(_POLL_S)) and time.monotonic() < deadline:
        link.receive(_POLL_S)
        service.tick(time.monotonic())


def _conclude(ledger: Ledger, artifact: Artifact, arguments: dict[str, Any]) -> AggregateReport:
    history, cost = rows(ledger), ledger.cost()
    adapter = ledger.folder / "adapter"
    save_peft(adapter, artifact.manifest, load(ledger.version(ledger.newest)))
    report = AggregateReport(
        rounds=history[-1].round,
        accuracy=history[-1].accuracy,
        loss=history[-1].loss,
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        link_bytes_sent=cost.bytes_sent,
        link_bytes_received=cost.bytes_received,
        wall_s=cost.seconds,
        adapter=str(adapter),
        history=history,
    )
    write_run(ledger.folder, artifact, arguments, report)
    return report
