"""``fleetune aggregate``: one job from its first round to the adapter, resumed by the same command after a kill."""

import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from safetensors.numpy import load

from fleetune.broker.configurators import CONFIGURATORS
from fleetune.broker.job import Patience, Settings, check_settings
from fleetune.broker.ledger import Ledger
from fleetune.broker.rows import Row, rows
from fleetune.broker.selection import SELECTIONS
from fleetune.broker.service import Service, topics, will
from fleetune.device_runtime.arguments import picked, plain
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.codecs import CODECS
from fleetune.device_runtime.contracts.run_file import write_run
from fleetune.device_runtime.contracts.wire import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.methods.optim import make_optimizer
from fleetune.device_runtime.methods.policies import make_policy
from fleetune.device_runtime.network.address import parse_url
from fleetune.device_runtime.network.link import Link, Will

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
    job: str,
    rounds: int,
    clients: int,
    out: Path | str,
    strategy: str = "fedavg",
    codec: str = "fp32",
    policy: str = "full",
    drop: float = 0.0,
    depth_shape: str = "uniform",
    period: int = 0,
    batch_size: int = 16,
    seq_len: int = 128,
    local_steps: int = 0,
    local_epochs: int = 1,
    lr: float = 2e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.0,
    warmup_steps: int = 0,
    decay: str = "constant",
    clip_norm: float = 0.0,
    min_clients: int = 0,
    deadline_s: float = 600.0,
    gather_s: float = 60.0,
    evaluate_every: int = 1,
    evaluation_s: float = 600.0,
    extensions_max: int = 10,
    seed: int = 0,
    ca_file: str | None = None,
    timeout_s: float = 20.0,
    on_round: Callable[[Row], object] | None = None,
) -> AggregateReport:
    """Combine what devices learn, round by round, into a PEFT adapter.

    The same arguments with an ``out`` that exists resume the job; ``mqtt`` and the waiting times may differ.

    Args:
        artifact_dir: folder made by ``fleetune export``; the devices hold the same.
        mqtt: URL of the MQTT server.
        job: name of the job; devices give the same.
        rounds: rounds in all.
        clients: devices asked in a round; of more, these many are drawn.
        out: folder for ``ledger.sqlite``, ``versions/``, ``adapter/`` and ``run.json``.
        strategy: how updates are combined.
        codec: how updates are packed.
        policy: layer policy of the devices.
        drop: mean share of layers dropped, in [0, 1).
        depth_shape: how the drop rate goes with depth.
        period: steps that the policies ``successive`` and ``cyclic`` stay on a block of layers, counted through all rounds;
            0 for all other policies.
        batch_size: samples a step.
        seq_len: text is cut after so many tokens.
        local_steps: steps a device makes in a round; 0 for ``local_epochs`` passes.
        local_epochs: passes over its data where ``local_steps`` is 0.
        lr: learning rate of the devices at its peak.
        optimizer: ``adamw`` or ``sgd``; starts afresh in every round.
        weight_decay: as torch's optimizer of that name takes it.
        warmup_steps: steps of each round over which the rate rises linearly.
        decay: ``constant``, ``linear`` or ``cosine``, within a round.
        clip_norm: bound on the gradients' joint L2 norm; 0 for none.
        min_clients: updates without which a round does not close; 0 for all of ``clients``.
        deadline_s: a round closes then, or is extended by as much again; 0 for never.
        gather_s: the first round waits so long for all clients; after that ``min_clients`` do.
        evaluate_every: versions evaluated: 0, every so many, and the last.
        evaluation_s: longest wait for the next report after the last round; 0 for ever.
        extensions_max: extensions of one round after which the aggregator stops.
        seed: of the selection of devices and of their local work.
        ca_file: PEM file of the authorities to trust for ``mqtts`` and ``wss``.
        timeout_s: longest wait for the MQTT server at the start.
        on_round: called with each row of ``history``, in order, when it is complete.

    Raises:
        ConfigError: a setting is wrong, or ``out`` holds another job.
        ArtifactError: the artifact is damaged.
        StateError: the ledger is damaged, or cannot be written.
        TransportError: the server is not there or refuses the login, or a round never gets enough updates.
    """
    arguments = plain(locals()) | {"mqtt": parse_url(mqtt).shown}  # a login is not for run.json
    work = picked(
        LocalWork,
        arguments,
        policy=PolicySpec(name=policy, drop=drop, shape=depth_shape, period=period),
        optimizer=picked(OptimizerSpec, arguments, name=optimizer),
        steps=local_steps,
        epochs=local_epochs,
        seed=0,  # every device of every round gets its own
    )
    patience = picked(Patience, arguments)
    artifact = open_artifact(artifact_dir)
    settings = picked(
        Settings, arguments, artifact=artifact.digest, min_clients=min_clients or clients, work=work
    )
    _check(settings, patience, artifact)
    session = secrets.token_hex(8)
    link = Link(
        mqtt,
        client_id=f"fleetune-aggregator-{job}",
        topics=topics(job),
        will=Will(*will(job, session)),
        ca_file=ca_file,
    )
    with _open_ledger(Path(out), settings) as ledger:
        link.open(timeout_s)
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


def _check(settings: Settings, patience: Patience, artifact: Artifact) -> None:
    check_settings(settings, patience)
    work = settings.work
    CODECS[work.codec]
    SELECTIONS[settings.selection], CONFIGURATORS[settings.configurator]
    make_policy(work.policy, artifact.manifest.num_layers)
    make_optimizer(work.optimizer, total_steps=1)


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
