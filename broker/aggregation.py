"""``fleetune aggregate``: one job from its first round to the adapter, resumed by the same command after a kill."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fleetune.broker.jobs.members import Members, names_in
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import FIXED, Job, Settings
from fleetune.broker.laws import lawful_settings
from fleetune.broker.methods.accounting import spending_of
from fleetune.broker.service.measures import why_unwatched
from fleetune.broker.service.outbound import Seal, unsigned
from fleetune.broker.service.result import AggregateReport, Result, check_folder
from fleetune.broker.service.rivals import has_rival, is_of_another
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.service.ticks import Ticks
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import Row
from fleetune.broker.tasks import PARDONED, listed, mark
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.run_file import plain
from fleetune.device_runtime.contracts.wire import aggregator_topic
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.network.address import Reach, parse_url
from fleetune.device_runtime.network.hooks import Party
from fleetune.device_runtime.network.link import Link, Will
from fleetune.device_runtime.network.signing import Signer, Signing, read_private
from fleetune.device_runtime.options import check

log = logging.getLogger(__name__)

_POLL_S = 0.1
"""A connection that was lost and stands again is noticed within this time."""
_GOODBYE_S = 15.0


def aggregate(
    artifact_dir: Path | str,
    *,
    mqtt: str,
    job: Job,
    out: Path | str,
    work: LocalWork = LocalWork(),
    patience: Patience = Patience(),
    reach: Reach = Reach(),
    signing: Signing = Signing(),
    members: Members = Members(),
    on_round: Callable[[Row], object] | None = None,
    on_note: Callable[[str], object] | None = None,
) -> AggregateReport:
    """Combine what devices learn, round by round, into a PEFT adapter.

    The same arguments with an ``out`` that exists resume the job; ``mqtt``, ``patience``, ``reach``, ``signing``,
    ``members`` and the number of rounds may differ: a job that was finished goes on if more are asked for.

    Args:
        artifact_dir: folder made by ``fleetune export``; the devices hold the same.
        mqtt: URL of the MQTT server.
        job: its name, rounds and clients, and how updates are combined.
        out: folder for ``ledger.sqlite`` and ``versions/``, and after each round ``adapter/`` and ``run.json``.
        work: what a device does in a round; its seed is made from the job's. Policy ``auto`` is the configurator of that name.
        patience: how long is waited for what.
        reach: how the MQTT server is reached.
        signing: the key that signs what devices are told; see ``docs/operate.md``.
        members: which devices may evaluate, and whose marks are forgiven.
        on_round: called with each row of ``history``, in order, when it is complete.
        on_note: called with a line on what the job waits for, when that changes, and on how it stands when it is stopped.

    Raises:
        ConfigError: a setting is wrong (all listed), ``out`` holds another job or what another command left, or another
            aggregator is at work on the job.
        ArtifactError: the artifact is damaged.
        StateError: the ledger is damaged, or cannot be written.
        TransportError: the server is not there or refuses the login, or a round never gets enough updates.
        ConfigError: too, if no device is left that can do any of the work that a configurator has for it.
    """
    arguments = plain(locals()) | {"mqtt": parse_url(mqtt).shown}  # a login is not for run.json
    artifact = open_artifact(artifact_dir)
    check(reach)
    key = read_private(signing.sign_key) if signing.sign_key else None
    settings = lawful_settings(artifact, job, work=work, patience=patience)
    check_folder(Path(out))
    evaluators, pardoned = names_in(members.evaluators), names_in(members.pardon)
    say = on_note or log.info
    with _open_ledger(Path(out), settings) as ledger:
        settings = ledger.begun.settings
        _tell_later(say, ledger, patience)
        _pardon(ledger, pardoned)
        result = Result(
            ledger,
            artifact,
            arguments,
            chooses=_chooses(settings),
            strikes=settings.strikes,
            spending=spending_of(settings.dp, settings.work),
            keep_rounds=0 if _chooses(settings) else patience.keep_rounds,
        )
        if ledger.newest >= job.rounds:
            say(f"{out}: all of its {ledger.newest} rounds were done before; with more --rounds it goes on")
        deadline = time.monotonic() + reach.timeout_s
        _check_alone(mqtt, job.job, reach)
        if ledger.newest < job.rounds and (unwatched := why_unwatched(settings)):
            say(unwatched)
        session = secrets.token_hex(8)
        signer = Signer(key, start=ledger.begin()) if key else None
        seal = signer.seal if signer else unsigned
        if signer:
            say(f"what devices are told is signed with key {signer.name}")
        link = _link_of_job(mqtt, job.job, reach, session, seal)
        link.open(max(deadline - time.monotonic(), 0.0))
        try:
            service = Service(
                link,
                ledger,
                settings,
                patience=patience,
                adapter=artifact.adapter(),
                session=session,
                now=time.monotonic(),
                on_row=_both(result.tell, on_round),
                on_note=on_note,
                seal=seal,
                evaluators=evaluators,
            )
            _serve(service, link, result)
        except (KeyboardInterrupt, SystemExit):
            result.keep(whole=True)
            say(f"stopped with {ledger.newest} of {job.rounds} rounds done; the same command goes on")
            raise
        finally:
            link.close()
        return result.conclude()


def _chooses(settings: Settings) -> bool:
    """Whether devices are asked for different things."""
    return (settings.configurator, settings.traffic) != (FIXED, FIXED)


def _pardon(ledger: Ledger, devices: Sequence[str]) -> None:
    """Forgive the marks of devices; ConfigError for one that has none."""
    marked = sorted({one.device for one in ledger.marks()})
    if strange := [device for device in devices if device not in marked]:
        raise ConfigError(
            f"pardon: nothing is noted of device {strange[0]!r}; of: {listed(marked) or 'nobody'}"
        )
    for device in devices:
        ledger.mark(mark(max(ledger.newest, 0), device, PARDONED, "by the operator"))
        log.warning("device %s is pardoned", device)


def _link_of_job(mqtt: str, job: str, reach: Reach, session: str, seal: Seal) -> Link:
    return Link.reaching(
        mqtt,
        reach,
        client_id=f"fleetune-aggregator-{job}",
        topics=topics(job),
        will=Will(*will(job, session, seal=seal)),
        party=_party(job, session),
    )


def _party(job: str, session: str) -> Party:
    return Party(
        denied=_denied(job),
        taken=f"another aggregator works on job {job!r}; stop one of them, or give each its own --job",
        is_other=partial(is_of_another, session=session),
    )


def _denied(job: str) -> str:
    return f"the aggregator's user must be let read and write fleetune/v1/{job}/#"


def _open_ledger(out: Path, settings: Settings) -> Ledger:
    with doing("written", out):
        return Ledger(out, settings)


def _tell_later(say: Callable[[str], object], ledger: Ledger, patience: Patience) -> None:
    """Say what differs from the release that began the job: rules that stay off, and what is kept of it from now on."""
    if ledger.begun.said:
        say(f"{ledger.folder}: {ledger.begun.said}")
    if ledger.begun.is_earlier:
        say(
            f"{ledger.folder}: an earlier release wrote this ledger; from now on --keep-versions {patience.keep_versions}, "
            f"--keep-rounds {patience.keep_rounds} and --grace-s {patience.grace_s:g} hold for it (0: as before)"
        )


def _check_alone(mqtt: str, job: str, reach: Reach) -> None:
    """Ask, under a name of its own, whether an aggregator of the job is there: under the job's it would be thrown off.

    A server that does not let this name in is not asked; whatever else is wrong with it is told when the job connects.

    Raises:
        ConfigError: one is.
    """
    topic = aggregator_topic(job)
    name = f"fleetune-visitor-{job}-{secrets.token_hex(4)}"
    visitor = Link.reaching(mqtt, reach, client_id=name, topics=[topic])
    try:
        visitor.open(reach.timeout_s)
        is_taken = has_rival(visitor, job)
    except TransportError as exc:
        log.info("nobody was asked for another aggregator: %s", exc)
        return
    finally:
        visitor.close()
    shown = visitor.address.shown
    if is_taken is None:
        log.warning("%s: what is said on %s does not come back: %s", shown, topic, _denied(job))
    if is_taken:
        raise ConfigError(
            f"{shown}: another aggregator of job {job!r} is at work; stop it, or name another --job"
        )


def _both(first: Callable[[Row], object], second: Callable[[Row], object] | None) -> Callable[[Row], object]:
    def tell(row: Row) -> None:
        first(row)
        if second:
            second(row)

    return tell


def _serve(service: Service, link: Link, result: Result) -> None:
    try:
        service.tick(time.monotonic())
        ticks = Ticks(service)
        while not service.finished:
            result.dropped = link.dropped
            result.keep()
            if message := link.receive(_POLL_S):
                service.take(*message, time.monotonic(), has_more=link.has_waiting)
            ticks.turn(time.monotonic(), has_more=link.has_waiting)
        _see_off(service, link)
    finally:
        service.stop(time.monotonic())


def _see_off(service: Service, link: Link) -> None:
    """Make sure that the news of the end reach the server, though it may be restarting."""
    deadline = time.monotonic() + _GOODBYE_S
    while not (link.connected and link.flush(_POLL_S)) and time.monotonic() < deadline:
        link.receive(_POLL_S)
        service.tick(time.monotonic())
