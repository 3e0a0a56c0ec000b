"""The aggregator at work: messages in, messages out, in one thread; a bad message costs one line in the log."""

import logging
import os
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import msgspec

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.accounting import spending_of
from fleetune.broker.rounds.actions import Action
from fleetune.broker.rounds.federation import Federation, cause_of
from fleetune.broker.service.executor import Executor
from fleetune.broker.service.meter import Meter
from fleetune.broker.service.narrator import Narrator
from fleetune.broker.service.outbound import Outbound, Seal, unsigned
from fleetune.broker.service.reporter import Reporter
from fleetune.broker.service.rivals import is_knock
from fleetune.broker.service.streams import Answer, Pass, Streams
from fleetune.broker.service.uploads import OURS, Uploads
from fleetune.broker.service.versions import Versions
from fleetune.broker.service.views import JobView, view_of
from fleetune.broker.service.watchers import Watchers
from fleetune.broker.store.rows import Row
from fleetune.broker.store.store import AFTERWARDS, Past, Store
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.contracts.gaussian import Source
from fleetune.device_runtime.contracts.mask_messages import MaskKeys, MaskReveal, MaskShares
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    DeviceStatus,
    Hello,
    Look,
    MaskMessage,
    Message,
    Report,
    Request,
    UpdateReady,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
    task_id_of,
)
from fleetune.device_runtime.errors import ConfigError, WireError, one_line
from fleetune.device_runtime.network.complaints import Complaints
from fleetune.device_runtime.network.connection import Connection
from fleetune.device_runtime.network.overflow import Overflow

log = logging.getLogger(__name__)

DEVICES_MAX = 100_000
"""Names of devices that are taken in one life of a service; it remembers something of each."""


def topics(job: str) -> list[str]:
    """What an aggregator subscribes to."""
    devices = [device_topic(job, "+", "up"), device_topic(job, "+", "status")]
    return [*devices, aggregator_topic(job), aggregator_topic(job, "look")]


def will(job: str, session: str, *, seal: Seal = unsigned) -> tuple[str, bytes]:
    """Last will of an aggregator: (topic, payload), to be retained."""
    status = AggregatorStatus(job=job, session=session, online=False, round=0, version=0)
    return (topic := aggregator_topic(job)), seal(topic, encode(status))


class Service:
    """One job over one connection. Call ``take`` for every message, and ``tick`` when it is due."""

    def __init__(
        self,
        link: Connection,
        store: Store,
        settings: Settings,
        *,
        patience: Patience,
        adapter: Arrays,
        session: str,
        now: float,
        on_row: Callable[[Row], object] | None = None,
        on_note: Callable[[str], object] | None = None,
        seal: Seal = unsigned,
        evaluators: Collection[str] = (),
        noise: Source = os.urandom,
    ) -> None:
        """Begin or resume.

        Args:
            link: open, subscribed to ``topics(job)``.
            store: the job's.
            settings: the job's.
            patience: how long to wait for what.
            adapter: version 0, float32 by tensor name.
            session: another one at every start.
            now: the time, seconds of any monotonic clock, the same as everywhere after.
            on_row: told of every round once, in order: when it is closed and the evaluating devices here have
                reported; after a restart from the first on.
            on_note: told in a line what the job waits for, when that changes.
            seal: signs what is said.
            evaluators: the devices that may evaluate; empty for all that say so.
            noise: of a job with central differential privacy; secret, but for simulations.

        Raises:
            StateError: the store is damaged.
        """
        self._versions = Versions(store, settings, adapter, noise=noise)
        past = store.past()
        self.federation = Federation(
            settings,
            patience,
            now=now,
            past=past,
            outcomes=store.outcomes(),
            digest_of=store.digest_of,
            evaluators=evaluators,
            turns=store.turns(),
        )
        self._link, self._store, self._job = link, store, settings.job
        self._meter = Meter(link, store, bucket=_bucket(past, settings), now=now)
        self._outbound = Outbound(link, store, self.federation, session=session, meter=self._meter, seal=seal)
        self._known: set[str] = set()
        self._watchers = Watchers(link, self.federation, self._outbound, here=self._known)
        self._on_row = on_row or (lambda _: None)
        spending = spending_of(settings.dp, settings.work)
        self._reporter = Reporter(store, self.federation, self._told, spending, settings.score)
        self._complaints = Complaints()
        self._streams = Streams(session, is_on=patience.share)
        self._executor = Executor(
            settings,
            store,
            self._versions,
            meter=self._meter,
            outbound=self._outbound,
            streams=self._streams,
            complaints=self._complaints,
        )
        self._narrator = Narrator(self.federation, on_note or (lambda _: None))
        self._uploads = Uploads(
            self.federation,
            store,
            self._versions,
            meter=self._meter,
            outbound=self._outbound,
            complaints=self._complaints,
            act=self._do,
            limit_bytes=patience.uploads_mb * 1e6,
        )
        self._overflow = Overflow(link)
        self._gone: set[str] = set()
        """Devices whose retained statuses say that they are offline."""
        self._seen: set[str] = set()
        self._connection_of: dict[str, str] = {}
        """Over which connection devices said hello last."""
        self._connections = -1
        self._closed, self._keep_rounds = past.closed, patience.keep_rounds
        log.info(
            "job %s, artifact %s: %d rounds done, %d asked for",
            settings.job,
            settings.artifact[:12],
            past.closed,
            settings.rounds,
        )

    @property
    def finished(self) -> bool:
        """Whether the job is over, and the store says so."""
        return self._store.finished

    def take(self, topic: str, payload: bytes, now: float, *, has_more: bool = False) -> None:
        """Take a message; one that is bad, or that anything goes wrong with, is dropped; of many some have a line in the log.

        Args:
            topic: that it came on.
            payload: the message.
            now: the time.
            has_more: another can be taken at once: updates may be kept together with those that it brings.

        Raises:
            StateError: the store cannot be read or written.
        """
        self._meter.received(_sender_or_nobody(topic), len(payload))
        if not payload:
            return  # a retained message was cleared
        with self._complaints.dropping(topic, _place(topic), now, ours=OURS):
            self._read(topic, decode(payload), now)
        self._go_on(now, has_more=has_more)

    def tick(self, now: float) -> None:
        """Do what is due; more often does no harm.

        Raises:
            TransportError: a round has been extended too often.
            ConfigError: no device here can do any of the work that there is.
        """
        if self._link.connections != self._connections:
            self._connections = self._link.connections
            self._outbound.announce()
            self._uploads.restart("", now)
        self._do(self.federation.tick(now), now)
        self._watchers.tick(now)
        self._go_on(now)

    def due_at(self, now: float) -> float:
        """Time at which ``tick`` next has something to do, if no message comes before; inf for never, ``now`` for at once."""
        if self._link.connections != self._connections:
            return now
        due = (
            self.federation.due_at(),
            self._uploads.due_at(),
            self._watchers.due_at(),
            self._streams.due_at,
        )
        return max(min(due), now)

    def snapshot(self) -> JobView:
        """Return the job as it stands, for a page."""
        return view_of(self.federation, self._store)

    def stop(self, now: float) -> None:
        """Say goodbye: what was spent is kept, and the status says offline; of a job that is over those of gone devices go."""
        if self.finished:
            self._outbound.clear(sorted(self._gone))
        self._uploads.keep(now)
        self._outbound.announce(online=False)
        self._meter.close(now)

    def _do(self, actions: Sequence[Action], now: float) -> None:
        if actions:
            self._uploads.keep(now)  # what they follow from, or close a round with, is durable
        closed = self.federation.rounds.closed
        self.federation.marked(self._executor.carry_out(actions, now))
        if closed != self._closed:
            self._closed = closed
            self._uploads.drop_late()
            oldest = self.federation.evaluations.oldest
            self._store.forget_before(oldest, but=self._versions.downlink.held())
            if self._keep_rounds:
                newest = self.federation.version - self._keep_rounds + 1
                self._store.settle(min(oldest, newest), most=self._keep_rounds)

    def _told(self, row: Row) -> None:
        self._watchers.keep(row)
        self._on_row(row)

    def _read(self, topic: str, message: Message, now: float) -> None:
        if topic == self._watchers.topic:
            if isinstance(message, Look):
                self._watchers.look(message, now)
        elif topic != self._outbound.topic:
            self._dispatch(_sender(topic), message, now)
        elif isinstance(message, AggregatorStatus) and is_knock(message):
            self._outbound.announce()

    def _dispatch(self, device_id: str, message: Message, now: float) -> None:
        self._admit(device_id)
        named = getattr(message, "device_id", device_id)
        if named != device_id:
            raise WireError(f"it names device {named[:64]!r}")
        job = getattr(message, "job", self._job)
        if job != self._job:
            raise WireError(f"it names job {job[:64]!r}; this is {self._job!r}")
        if isinstance(message, UpdateReady | Report | Decline):
            self._streams.leave(device_id)  # it has what it was offered, or does not want it
        if not isinstance(message, DeviceStatus):
            self.federation.rounds.hear(device_id)
        match message:
            case Chunk():
                self._meter.chunk(device_id, message)
                self._uploads.add(device_id, message, now)
            case Request():
                self._serve(device_id, message, now)
            case UpdateReady():
                self._uploads.announced(msgspec.structs.replace(message, task_id=task_id_of(message)), now)
            case Report():
                self._reported(msgspec.structs.replace(message, task_id=task_id_of(message)), now)
            case Hello():
                self._hello(message, now)
            case DeviceStatus():
                self._status(message, now)
            case MaskKeys() | MaskShares() | MaskReveal():
                self._masked(message, now)
            case Decline():
                self._complaints.warn(
                    device_id, now, "round %d: %s declined: %s", message.round, device_id, message.reason
                )
                if task := self.federation.owed(message):
                    self._store.decline(task.task_id, cause_of(message), message.reason)
                self._do(self.federation.declined(message, now), now)
            case _:
                raise WireError(f"an aggregator takes no {type(message).__name__}")

    def _masked(self, message: MaskMessage, now: float) -> None:
        """Take what a device says of its masks: durable first; WireError if it is nothing to go by."""
        if message.round <= self.federation.rounds.closed:
            return  # said twice, and late
        if reason := self.federation.rounds.mask_refusal(message):
            raise WireError(f"round {message.round}: {reason}")
        if note := self.federation.rounds.mask_note(message):
            self._store.note(self.federation.round, note)
        self._do(self.federation.masked(message, note, now), now)

    def _admit(self, device_id: str) -> None:
        if device_id not in self._seen:
            if len(self._seen) >= DEVICES_MAX:
                raise WireError(f"{DEVICES_MAX} devices have been here; no further one is taken")
            self._seen.add(device_id)

    def _hello(self, hello: Hello, now: float) -> None:
        if hello.device_id not in self._known:
            log.info(
                "device %s is here to %s, with %d samples",
                hello.device_id,
                hello.role,
                hello.num_samples,
            )
            self._known.add(hello.device_id)
        if not hello.connection or self._connection_of.get(hello.device_id) != hello.connection:
            self._uploads.restart(hello.device_id, now)
        self._connection_of[hello.device_id] = hello.connection
        self._streams.listens(hello.device_id, is_able=hello.listens)
        self._versions.downlink.holds(hello.device_id, hello.holds, hello.mask, original=hello.original)
        self._do(self.federation.hello(hello, now), now)

    def _status(self, status: DeviceStatus, now: float) -> None:
        if status.paused and status.paused != self.federation.rounds.roster.paused.get(status.device_id):
            log.info("device %s pauses: %s", status.device_id, status.paused)
        self.federation.paused(status.device_id, status.paused if status.online else "")
        if status.online:
            self._gone.discard(status.device_id)
            self.federation.rounds.hear(status.device_id)
            return
        self._gone.add(status.device_id)
        self._connection_of.pop(status.device_id, None)
        self._uploads.gone(status.device_id, now)
        self._streams.leave(status.device_id)
        if status.device_id in self._known:
            log.info("device %s is gone", status.device_id)
            self._known.discard(status.device_id)
        self._do(self.federation.offline(status.device_id, now), now)

    def _serve(self, device_id: str, request: Request, now: float) -> None:
        if self._versions.downlink.has_smaller(device_id, self._outbound.chunk_bytes):
            self._offer_again(device_id, now)
            return
        match self._streams.ask(device_id, request, now) if request.shared else Answer.ALONE:
            case Answer.LATE:
                self._offer_again(device_id, now)
            case Answer.ALONE:
                self._streams.leave(device_id)
                self._hand(device_id, request)

    def _offer_again(self, device_id: str, now: float) -> None:
        is_asked = device_id in self.federation.rounds.roster
        again = self.federation.again if is_asked else self._evaluate_again
        self._do(again(device_id, now), now)

    def _publish(self, passed: Pass) -> None:
        """Send what several devices wait for once; what one waits for to that one."""
        first, *others = passed.devices
        if not others:
            self._hand(first, passed.request)
            return
        downlink = self._versions.downlink
        self._meter.knows(passed.request.sha256, downlink.sizes(first, passed.request))
        for device_id in others:
            downlink.serves(device_id)
        for chunk in downlink.chunks(first, passed.request):
            if self._outbound.publish(passed.stream, passed.part, chunk):
                self._meter.count(down=len(chunk.data))

    def _hand(self, device_id: str, request: Request) -> None:
        self._meter.knows(request.sha256, self._versions.downlink.sizes(device_id, request))
        for chunk in self._versions.downlink.chunks(device_id, request):
            if self._outbound.serve(device_id, chunk):
                self._meter.count(down=len(chunk.data))

    def _evaluate_again(self, device_id: str, now: float) -> Sequence[Action]:
        evaluations = self.federation.evaluations
        return evaluations.hello(device_id) if device_id in evaluations.present else ()

    def _go_on(self, now: float, *, has_more: bool = False) -> None:
        for passed in self._streams.due(now):
            with self._complaints.dropping(passed.stream, passed.devices[0], now, ours=OURS):
                self._publish(passed)
        self._uploads.tick(now, has_more=has_more)
        self._reporter.tell()
        self._narrator.tell(now)
        self._overflow.tell(now)

    def _reported(self, report: Report, now: float) -> None:
        self._versions.downlink.worked_from(report.device_id, report.version)
        reason = self.federation.evaluations.judge(report, self.federation.version)
        verdict = Verdict(
            job=report.job, task_id=report.task_id, round=report.round, accepted=not reason, reason=reason
        )
        if reason:
            self._outbound.tell(report.device_id, verdict)
            self._complaints.warn(report.device_id, now, "report of %s refused: %s", report.device_id, reason)
            self._do(self.federation.report_refused(report, now), now)
            return
        self._store.report(report)
        self._outbound.tell(report.device_id, verdict)
        self._do(self.federation.reported(report, now), now)


def _bucket(past: Past, settings: Settings) -> int:
    """Round, 0 before the first, or AFTERWARDS, that costs are charged to from now on."""
    if past.closed >= settings.rounds:
        return AFTERWARDS
    return past.closed + 1 if past.closed or past.tasks else 0


def _place(topic: str) -> str:
    """Whom a topic is of, for the log."""
    return one_line(topic.rpartition("/")[0].rpartition("/")[2])


@lru_cache(4096)
def _sender(topic: str) -> str:
    parts = topic.split("/")
    try:
        return check_name("device", parts[-2] if len(parts) > 1 else "")
    except ConfigError as exc:
        raise WireError(one_line(exc)) from exc


def _sender_or_nobody(topic: str) -> str:
    """The device that a topic is of; empty for the aggregator's own, and where it names none."""
    try:
        return _sender(topic) if "/device/" in topic else ""
    except WireError:
        return ""
