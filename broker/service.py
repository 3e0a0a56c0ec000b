"""The aggregator at work: messages in, messages out, in one thread; a bad message costs one line in the log."""

import logging
from collections.abc import Callable, Iterable

from fleetune.broker.actions import Action
from fleetune.broker.executor import Executor
from fleetune.broker.job import Patience, Settings
from fleetune.broker.ledger import AFTERWARDS, Ledger, Row
from fleetune.broker.meter import Meter
from fleetune.broker.pulls import Pulls
from fleetune.broker.rounds import Federation, Past, verdict_on
from fleetune.broker.versions import Versions
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.transfer import Pull
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    DeviceStatus,
    Hello,
    Message,
    Report,
    Request,
    UpdateReady,
    Verdict,
    aggregator_topic,
    check_name,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.errors import ConfigError, WireError, one_line
from fleetune.device_runtime.network.connection import Connection

log = logging.getLogger(__name__)


def topics(job: str) -> list[str]:
    """What an aggregator subscribes to."""
    return [device_topic(job, "+", "up"), device_topic(job, "+", "status")]


def will(job: str, session: str) -> tuple[str, bytes]:
    """Last will of an aggregator: (topic, payload), to be retained."""
    status = AggregatorStatus(job=job, session=session, online=False, round=0, version=0)
    return aggregator_topic(job), encode(status)


class Service:
    """One job over one connection. Call ``take`` for every message, and ``tick`` now and then."""

    def __init__(
        self,
        link: Connection,
        ledger: Ledger,
        settings: Settings,
        *,
        patience: Patience,
        adapter: Arrays,
        session: str,
        now: float,
        on_row: Callable[[Row], object] | None = None,
    ) -> None:
        """Begin or resume.

        Args:
            link: open, subscribed to ``topics(job)``.
            ledger: the job's.
            settings: the job's.
            patience: how long to wait for what.
            adapter: version 0, float32 by tensor name.
            session: another one at every start.
            now: the time, seconds of any monotonic clock, the same as everywhere after.
            on_row: told of every round once, in order: when it is closed and the evaluating devices here have
                reported; after a restart from the first on.

        Raises:
            StateError: the ledger's files are damaged.
        """
        self._versions = Versions(ledger, settings, adapter)
        past = ledger.past()
        self.federation = Federation(settings, patience, now=now, past=past)
        self._link, self._ledger, self._settings = link, ledger, settings
        self._meter = Meter(link, ledger, bucket=_bucket(past, settings), now=now)
        self._executor = Executor(
            link,
            ledger,
            settings,
            federation=self.federation,
            versions=self._versions,
            meter=self._meter,
            session=session,
            on_row=on_row or (lambda _: None),
        )
        self._pulls = Pulls(size_bytes_max=self._versions.update_bytes_max)
        self._known: set[str] = set()
        self._connections = -1
        log.info(
            "job %s, artifact %s: %d of %d rounds done",
            settings.job,
            settings.artifact[:12],
            past.version,
            settings.rounds,
        )

    @property
    def finished(self) -> bool:
        """Whether the job is over."""
        return self._executor.finished

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message; a bad one is dropped with one line in the log."""
        try:
            device_id = _sender(topic)
            self._dispatch(device_id, decode(payload), now)
        except WireError as exc:
            log.warning("dropped a message on %s: %s", topic, exc)
        self._pump(now)

    def tick(self, now: float) -> None:
        """Do what is due; a few times a second is often enough.

        Raises:
            TransportError: a round has been extended too often.
        """
        if self._link.connections != self._connections:
            self._connections = self._link.connections
            self._executor.announce()
        self._do(self.federation.tick(now), now)
        self._pump(now)
        self._executor.tell_rows()

    def stop(self, now: float) -> None:
        """Say goodbye: what was spent is kept, and the status says offline."""
        self._meter.spend(now)
        self._executor.announce(online=False)

    def _do(self, actions: Iterable[Action], now: float) -> None:
        self._executor.carry_out(actions, now)
        for late in self._pulls.drop_below(self.federation.version + 1):
            self._executor.tell(late.device_id, verdict_on(late, f"round {late.round} is closed"))

    def _dispatch(self, device_id: str, message: Message, now: float) -> None:
        named = getattr(message, "device_id", device_id)
        if named != device_id:
            raise WireError(f"it names device {named[:64]!r}")
        job = getattr(message, "job", self._settings.job)
        if job != self._settings.job:
            raise WireError(f"it names job {job[:64]!r}; this is {self._settings.job!r}")
        if isinstance(message, Hello):
            self._hello(message, now)
        elif isinstance(message, DeviceStatus):
            self._status(message, now)
        elif isinstance(message, UpdateReady):
            self._announced(message, now)
        elif isinstance(message, Chunk):
            self._meter.count(up=len(message.data))
            self._pulls.add(device_id, message, now)
        elif isinstance(message, Request):
            self._serve(device_id, message)
        elif isinstance(message, Report):
            self._reported(message, now)
        elif isinstance(message, Decline):
            log.warning("round %d: %s declined: %s", message.round, device_id, message.reason)
            self._do(self.federation.declined(device_id, message.round, now), now)
        else:
            raise WireError(f"an aggregator takes no {type(message).__name__}")

    def _hello(self, hello: Hello, now: float) -> None:
        if hello.device_id not in self._known:
            log.info(
                "device %s is here to %s, with %d samples",
                hello.device_id,
                hello.role[:64],
                hello.num_samples,
            )
            self._known.add(hello.device_id)
        self._pulls.restart(hello.device_id, now)
        self._versions.downlink.holds(hello.device_id, hello.holds)
        self._do(self.federation.hello(hello, now), now)

    def _status(self, status: DeviceStatus, now: float) -> None:
        self.federation.paused(status.device_id, is_paused=status.online and bool(status.paused))
        if status.paused:
            log.info("device %s pauses: %s", status.device_id, one_line(status.paused))
        if not status.online and status.device_id in self._known:
            log.info("device %s is gone", status.device_id)
            self._known.discard(status.device_id)
            self._do(self.federation.offline(status.device_id, now), now)

    def _serve(self, device_id: str, request: Request) -> None:
        for chunk in self._versions.downlink.chunks(request):
            self._meter.count(down=len(chunk.data))
            self._executor.tell(device_id, chunk)

    def _announced(self, update: UpdateReady, now: float) -> None:
        self._versions.downlink.worked_from(update.device_id, update.version)
        if verdict := self.federation.judge(update):
            self._executor.tell(update.device_id, verdict)
            return
        try:
            self._pulls.begin(update, now)
        except WireError as exc:
            self._refuse(update, str(exc), now)

    def _pump(self, now: float) -> None:
        for update, pull in self._pulls.finished(now):
            self._received(update, pull, now)
        for device_id, request in self._pulls.due(now):
            self._executor.tell(device_id, request)

    def _received(self, update: UpdateReady, pull: Pull, now: float) -> None:
        if verdict := self.federation.judge(update):
            self._executor.tell(update.device_id, verdict)
            return
        try:
            content = pull.content()
            self._versions.add(content, update.num_samples)
        except WireError as exc:
            self._refuse(update, str(exc), now)
            return
        self._ledger.accept(update, content)
        self._meter.spend(now)
        self._executor.tell(update.device_id, verdict_on(update))
        self._do(self.federation.accepted(update, now), now)

    def _refuse(self, update: UpdateReady, reason: str, now: float) -> None:
        log.warning("round %d: update of %s refused: %s", update.round, update.device_id, reason)
        self._executor.tell(update.device_id, verdict_on(update, reason))
        self._do(self.federation.refused(update, reason, now), now)

    def _reported(self, report: Report, now: float) -> None:
        self._versions.downlink.worked_from(report.device_id, report.version)
        reason = self.federation.evaluations.judge(report, self.federation.version)
        verdict = Verdict(job=report.job, round=report.round, accepted=not reason, reason=reason)
        if reason:
            self._executor.tell(report.device_id, verdict)
            log.warning("report of %s refused: %s", report.device_id, reason)
            self._do(self.federation.declined(report.device_id, report.version, now), now)
            return
        self._ledger.report(report)
        self._executor.tell(report.device_id, verdict)
        self._do(self.federation.reported(report, now), now)


def _bucket(past: Past, settings: Settings) -> int:
    """What the time from now on is booked under."""
    if past.version == settings.rounds:
        return AFTERWARDS
    return past.version + 1 if past.version or past.asked else 0


def _sender(topic: str) -> str:
    parts = topic.split("/")
    try:
        return check_name("device", parts[-2] if len(parts) > 1 else "")
    except ConfigError as exc:
        raise WireError(str(exc)) from exc
