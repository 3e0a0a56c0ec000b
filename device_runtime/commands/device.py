"""``fleetune device``: a device's life in one process, resumed by the same command after a kill."""

import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.events import NO_ROUND, Event
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Duty, Identity
from fleetune.device_runtime.agent.outbox_file import open_outbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.commands.device_report import DeviceReport, Tally
from fleetune.device_runtime.commands.explain import account_of, check_terms
from fleetune.device_runtime.commands.own_evaluations import OwnEvaluations
from fleetune.device_runtime.commands.own_folder import identify, state_folder
from fleetune.device_runtime.commands.own_vitals import own_vitals
from fleetune.device_runtime.commands.sign import check_signed
from fleetune.device_runtime.commands.silence import Silence
from fleetune.device_runtime.commands.systemd import Notifier
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.class_means import COUNTS
from fleetune.device_runtime.contracts.class_weights import class_weight_problems
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET, new_secret
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.texts_apart import holds_apart
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.packing import NOT_APART, packed
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.files import DiskFiles, alone_in
from fleetune.device_runtime.network.address import Reach, parse_url
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.hooks import Party
from fleetune.device_runtime.network.link import Link, Will
from fleetune.device_runtime.network.overflow import Overflow
from fleetune.device_runtime.network.signing import Trust, trusted_of, vouching_of
from fleetune.device_runtime.options import check, refuse
from fleetune.device_runtime.rules.gate import open_gate
from fleetune.device_runtime.terms.behind import num_used
from fleetune.device_runtime.terms.contract import Contract
from fleetune.device_runtime.terms.day import boot_id
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.trainer import Trainer

OWN_MODEL = "personal"
"""PEFT folder in the state folder: the device's own model, if layers stay personal."""

_SLEEP_MAX_S = 600.0
_DEFAULT_SEQ_LEN = LocalWork().seq_len


def device(
    artifact_dir: Path | str,
    *,
    data: Path | str,
    mqtt: str,
    job: str,
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
    on_event: Callable[[Event], object] | None = None,
) -> DeviceReport:
    """Train, or evaluate, for an aggregator until the job is over.

    The same arguments after a kill resume: the outbox and the checkpoint are in ``state``.

    Args:
        artifact_dir: folder made by ``fleetune export``; the aggregator holds the same.
        data: labelled samples; see :func:`fleetune.device_runtime.data.loading.load_dataset`. They never leave the device.
        mqtt: URL of the MQTT server.
        job: name of the job, as the aggregator has it.
        id: name of this device; by default the MQTT user name, or one made up, kept in ``state``.
        state: folder that survives restarts; by default ``~/.fleetune/JOB/ID`` (or ``device`` without an ID).
        columns: where the data's rows have the text and the label.
        sequences: how the texts of a causal language model become sequences; an evaluating device packs none.
        duty: whether it trains or evaluates, and how it goes about it.
        resources: threads, memory and disk that its work may use.
        reach: how the MQTT server is reached.
        rules: when it may work, a TOML file or a mapping; see ``docs/device-rules.md``. It pauses between
            steps and stays online; a round that ends before the pause does is declined.
        terms: what an aggregator may ask of this device, see ``docs/privacy.md``; what is outside is declined.
        trust: the keys of which one must have signed the artifact and what an aggregator says; without them whoever can write to
            the server can give work.
        on_event: told of offers, results and verdicts, and every few seconds of a step.

    Raises:
        ConfigError: an argument is wrong, or the aggregator cannot use this device.
        ArtifactError: the artifact is damaged, or no trusted key signed it.
        DataError: the data does not say what it should.
        StateError: the state folder is damaged, or cannot be written.
        TransportError: the server is not there or refuses the login, or the aggregator is silent for too long.
    """
    check(duty, reach)
    check_name("job", job)
    login = parse_url(mqtt).username
    notifier = Notifier()
    gate = open_gate(rules)
    artifact = open_artifact(artifact_dir)
    check_terms(terms, artifact.manifest)
    refuse(class_weight_problems(duty.class_weights, artifact.manifest))
    if trusted := trusted_of(trust):
        check_signed(artifact, trusted)
    folder = state_folder(state, job=job, device_id=id)
    with (
        alone_in(folder, "another device process works here; give each its own --state"),
        open_outbox(folder / "outbox.sqlite") as outbox,
        Machine(artifact, resources, folder=folder / "cache", most_step_s=terms.most_step_seconds) as machine,
    ):
        tally, files = Tally(on_event, notifier), DiskFiles(folder)
        kept = OwnEvaluations(folder, artifact.manifest, Path(data), then=tally)
        own = folder / OWN_MODEL
        desk = _Desk(
            artifact,
            Path(data),
            columns,
            machine,
            notifier,
            tally,
            kept=kept,
            own=own,
            files=files,
            terms=terms,
            class_weights=duty.class_weights,
            sequences=sequences
            if duty.role == "train"
            else msgspec.structs.replace(sequences, packing=False),
        )
        identity = Identity(
            identify(outbox, id, login), job, artifact.digest, duty.role, secrets.token_hex(8)
        )
        party, vouching = _party(identity, login), vouching_of(reach, trust, device_id=identity.device_id)
        link = Link.reaching(
            mqtt,
            reach,
            client_id=f"fleetune-{job}-{identity.device_id}",
            topics=identity.topics,
            will=Will(*identity.will),
            party=party,
        )
        home = Home(
            link,
            outbox,
            files,
            identity,
            FirstAdapter.of(artifact.adapter()),
            checkpoint_every=duty.checkpoint_every,
            on_event=kept,
            contract=Contract(
                terms, facts=outbox, files=files, account=account_of(duty, files), boot=boot_id()
            ),
            trusted=trusted,
            voucher=vouching.voucher,
            mask_authorities=vouching.authorities,
            vitals=own_vitals if duty.tell_progress else None,
        )
        agent = Agent(home, desk.workbench(tells_labels=duty.tell_labels), gate=gate)
        link.open(reach.timeout_s)
        tally(Event("connected", NO_ROUND, text=_whereabouts(link, identity)))
        notifier.status = f"job {job}: waiting for the aggregator"
        notifier.ready()
        silence = Silence(link.address.shown, job=job, advice=party.denied)
        try:
            _live(agent, link, notifier=notifier, silence=silence, idle_limit_s=duty.idle_limit_s)
        finally:
            notifier.stopping()
            _say_goodbye(link, identity, is_over=bool(agent.finished))
            link.close()
    if agent.is_unwanted:
        raise ConfigError(f"the aggregator of job {job!r} cannot use this device: {agent.finished}")
    return tally.report(identity.device_id, link=link, gate=gate, reason=agent.finished)


class _Desk:
    """The machine and the data of a device; the data is read again when the aggregator asks for another length."""

    def __init__(
        self,
        artifact: Artifact,
        data: Path,
        columns: Columns,
        machine: Machine,
        notifier: Notifier,
        tally: Tally,
        *,
        kept: OwnEvaluations,
        own: Path,
        files: DiskFiles,
        terms: Terms,
        class_weights: str = "",
        sequences: Sequences = Sequences(),
    ) -> None:
        self._class_weights = class_weights
        self._least_batch, self._files = terms.least_batch, files
        self._artifact, self._machine, self._own = artifact, machine, own
        self._data, self._columns, self._sequences = data, columns, sequences
        self._notifier, self._tally, self._kept = notifier, tally, kept
        self._seq_len, self._dataset = _DEFAULT_SEQ_LEN, self._load(_DEFAULT_SEQ_LEN)

    def workbench(self, *, tells_labels: bool) -> Workbench:
        return Workbench(
            self._start,
            self._evaluate,
            self._dataset.num_samples,
            self._class_sums,
            keep=self._keep,
            data=self._dataset.digest,
            histogram=self._histogram if tells_labels else tuple,
        )

    def _histogram(self) -> tuple[int, ...]:
        return self._dataset.histogram()

    def _start(self, work: LocalWork, adapter: Arrays) -> Trainer:
        rows = self._rows(work.seq_len)
        used = num_used(work, rows.num_samples, least_batch=self._least_batch)
        if used < rows.num_samples:
            rows = rows.subset(np.arange(used))
        secret = self._files.secret(NOISE_SECRET, new_secret) if work.hides_samples else b""
        return self._machine.trainer(rows, work, adapter, class_weights=self._class_weights, secret=secret)

    def _evaluate(self, work: LocalWork, adapter: Arrays) -> Evaluation:
        rows = self._rows(work.seq_len)
        self._machine.prepare(rows, work)
        return self._kept.judge(self._machine, rows, adapter, before_batch=self._notifier.beat)

    def _class_sums(self, work: LocalWork, adapter: Arrays) -> tuple[Arrays, Mapping[str, float]]:
        rows, start_s = self._rows(work.seq_len), time.perf_counter()
        sums = self._machine.class_sums(rows, work, adapter, before_batch=self._notifier.beat)
        return sums, {"seconds": time.perf_counter() - start_s, "samples": float(sums[COUNTS].sum())}

    def _keep(self, adapter: Arrays) -> None:
        save_peft(self._own, self._artifact.manifest, adapter)

    def _rows(self, seq_len: int) -> Dataset:
        if seq_len != self._seq_len:
            self._seq_len, self._dataset = seq_len, self._load(seq_len)
        return self._dataset

    def _load(self, seq_len: int) -> Dataset:
        manifest, folder = self._artifact.manifest, self._artifact.folder
        found = load_dataset(
            self._data,
            manifest,
            folder,
            seq_len=seq_len,
            columns=self._columns,
            sequences=self._sequences,
        )
        if found.cut:
            self._tally(Event("data", NO_ROUND, text=str(found.cut)))
        if not self._sequences.packing:
            return found
        if not holds_apart(manifest):
            self._tally(Event("data", NO_ROUND, text=NOT_APART))
        return packed(found, apart=holds_apart(manifest))


def _say_goodbye(link: Link, identity: Identity, *, is_over: bool) -> None:
    """Say that it is offline; when its job is over nothing of it stays at the server."""
    topic, offline = identity.will
    send(link, topic, offline, retain=not is_over)
    if is_over:
        send(link, topic, b"", retain=True)


def _live(agent: Agent, link: Link, *, notifier: Notifier, silence: Silence, idle_limit_s: float) -> None:
    """Poll the agent whenever something is due, and sleep in between until a message comes."""
    busy_at, overflow = time.monotonic(), Overflow(link)
    silence.begin(busy_at)
    while not agent.finished:
        notifier.beat()
        was_paused = agent.is_paused
        has_more = agent.poll(time.monotonic())
        if agent.finished:
            return
        now = time.monotonic()
        if has_more or was_paused or agent.is_paused:
            busy_at = now
        idle_at = max(busy_at, agent.heard_at) + (idle_limit_s or math.inf)
        if now >= idle_at:
            raise TransportError(silence.text(f"for {idle_limit_s:g} s"))
        silence.check(agent, now)
        overflow.tell(now)
        due_at = min(agent.due_at(now), notifier.due_at, silence.due_at, idle_at)
        if due_at > now and (message := link.receive(min(due_at - now, _SLEEP_MAX_S))):
            agent.take(*message, time.monotonic())


def _whereabouts(link: Link, identity: Identity) -> str:
    return (
        f"{link.address.shown} as {identity.device_id!r} in job {identity.job!r}; waiting for the aggregator"
    )


def _party(identity: Identity, login: str | None) -> Party:
    name, topics = identity.device_id, f"{identity.up.rpartition('/')[0]}/#"
    who = f"user {login!r}" if login else "this client"
    cure = (
        f"; under fleetune's own a device's id is its user name: give --id {login}, or log in as {name!r}"
        if login and login != name
        else f"; the name in its certificate must be its id, {name!r}, if it has one"
        if not login
        else ""
    )
    return Party(
        denied=f"the server's access list (ACL) must let {who} read and write {topics}{cure}",
        taken=f"another device named {name!r} uses this id; give each its own --id",
        is_other=identity.is_of_namesake,
        is_foreign=identity.is_foreign,
    )
