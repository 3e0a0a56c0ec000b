"""The aggregator at work: messages in, messages out, in one thread; a bad message costs one line in the log."""

import logging
from collections.abc import Callable, Iterable

import msgspec
from safetensors.numpy import load

from broker.ledger import AFTERWARDS, Cost, Ledger, Row
from broker.pulls import Pulls
from broker.rounds import Action, Ask, Close, Dismiss, Federation, Finish, Send
from broker.settings import Patience, Settings, device_work
from broker.strategies import STRATEGIES, Sums
from device_runtime.arrays import Arrays, to_bytes
from device_runtime.codecs import decode_update, update_bytes_max
from device_runtime.errors import ConfigError, WireError, one_line
from device_runtime.loopback import Connection, send
from device_runtime.transfer import Outgoing, Pull
from device_runtime.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    DeviceStatus,
    Finished,
    Hello,
    Message,
    Offer,
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

log = logging.getLogger(__name__)

_SHELF = 3
"""Versions ready to be served at once; evaluating devices may be some behind."""
_REQUEST_LIMIT = 32


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
        if not ledger.has_version(0):
            ledger.add_version(0, to_bytes(adapter))
        past = ledger.past()
        self.federation = Federation(settings, patience, now=now, past=past)
        self._link, self._ledger, self._settings = link, ledger, settings
        self._session, self._on_row = session, on_row or (lambda _: None)
        self._strategy = STRATEGIES[settings.strategy]()
        self._reference: Arrays = load(ledger.version(past.version))
        size_bytes_max = update_bytes_max(settings.work.codec, self._reference)
        self._pulls = Pulls(size_bytes_max=size_bytes_max)
        self._sums = self._folded(past.version + 1)
        self._shelf: dict[int, Outgoing] = {}
        self._known: set[str] = set()
        self._connections = -1
        self._next_row = 0
        self._is_over = past.finished
        self._bucket = past.version + 1 if past.version or past.asked else 0
        if past.version == settings.rounds:
            self._bucket = AFTERWARDS
        self._cost = Cost()
        log.info(
            "job %s, artifact %s: %d of %d rounds done",
            settings.job,
            settings.artifact[:12],
            past.version,
            settings.rounds,
        )
        self._spent_at, self._spent_bytes = now, (link.bytes_sent, link.bytes_received)

    @property
    def finished(self) -> bool:
        """Whether the job is over."""
        return self._is_over

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
            self._announce()
        self._do(self.federation.tick(now), now)
        self._pump(now)
        self._tell_rows()

    def stop(self, now: float) -> None:
        """Say goodbye: what was spent is kept, and the status says offline."""
        self._spend(self._bucket, now)
        self._announce(online=False)

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
            self._count(up=len(message.data))
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
        self._do(self.federation.hello(hello, now), now)

    def _status(self, status: DeviceStatus, now: float) -> None:
        self.federation.paused(status.device_id, is_paused=status.online and bool(status.paused))
        if status.paused:
            log.info("device %s pauses: %s", status.device_id, one_line(status.paused))
        if not status.online and status.device_id in self._known:
            log.info("device %s is gone", status.device_id)
            self._known.discard(status.device_id)
            self._do(self.federation.offline(status.device_id, now), now)

    def _announced(self, update: UpdateReady, now: float) -> None:
        if verdict := self.federation.judge(update):
            self._tell(update.device_id, verdict)
            return
        try:
            self._pulls.begin(update, now)
        except WireError as exc:
            self._refuse(update, str(exc), now)

    def _pump(self, now: float) -> None:
        for update, pull in self._pulls.finished(now):
            self._received(update, pull, now)
        for device_id, request in self._pulls.due(now):
            self._tell(device_id, request)

    def _received(self, update: UpdateReady, pull: Pull, now: float) -> None:
        if verdict := self.federation.judge(update):
            self._tell(update.device_id, verdict)
            return
        try:
            content = pull.content()
            values = decode_update(content, self._reference, codec=self._settings.work.codec)
            self._sums = self._strategy.add(self._sums, values, update.num_samples)
        except WireError as exc:
            self._refuse(update, str(exc), now)
            return
        self._ledger.accept(update, content)
        self._spend(self._bucket, now)
        verdict = Verdict(job=update.job, round=update.round, digest=update.payload.sha256, accepted=True)
        self._tell(update.device_id, verdict)
        self._do(self.federation.accepted(update, now), now)

    def _refuse(self, update: UpdateReady, reason: str, now: float) -> None:
        log.warning("round %d: update of %s refused: %s", update.round, update.device_id, reason)
        digest = update.payload.sha256
        verdict = Verdict(
            job=update.job, round=update.round, digest=digest, accepted=False, reason=reason[:500]
        )
        self._tell(update.device_id, verdict)
        self._do(self.federation.refused(update, reason[:500], now), now)

    def _reported(self, report: Report, now: float) -> None:
        reason = self.federation.judge_report(report)
        verdict = Verdict(job=report.job, round=report.round, accepted=not reason, reason=reason)
        if reason:
            self._tell(report.device_id, verdict)
            log.warning("report of %s refused: %s", report.device_id, reason)
            self._do(self.federation.declined(report.device_id, report.version, now), now)
            return
        self._ledger.report(report)
        self._tell(report.device_id, verdict)
        self._do(self.federation.reported(report, now), now)

    def _do(self, actions: Iterable[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Send):
                self._offer(action)
            elif isinstance(action, Ask):
                self._ask(action, now)
            elif isinstance(action, Close):
                self._close(action, now)
            elif isinstance(action, Dismiss):
                self._dismiss(action)
            elif isinstance(action, Finish):
                self._finish(action, now)

    def _ask(self, ask: Ask, now: float) -> None:
        log.info("round %d: asking %s", ask.round, ", ".join(ask.devices))
        self._ledger.ask(ask.round, ask.devices)
        if self._bucket != ask.round:
            self._spend(self._bucket, now)
            self._bucket = ask.round

    def _offer(self, sending: Send) -> None:
        offer = Offer(
            job=self._settings.job,
            round=sending.round,
            version=sending.version,
            role=sending.role,
            work=device_work(self._settings, round_number=max(sending.round, 1), position=sending.position),
            adapter=self._outgoing(sending.version).manifest,
            deadline_s=sending.deadline_s,
        )
        self._tell(sending.device_id, offer)

    def _close(self, close: Close, now: float) -> None:
        self._spend(self._bucket, now)
        memory = self._ledger.memory(close.round - 1)
        new, kept = self._strategy.finish(self._sums, self._reference, load(memory) if memory else {})
        self._ledger.add_version(close.round, to_bytes(new), memory=to_bytes(kept) if kept else b"")
        self._reference, self._sums = new, self._strategy.init(new)
        self._bucket = close.round + 1 if close.round < self._settings.rounds else AFTERWARDS
        for late in self._pulls.drop_below(close.round + 1):
            reason = f"round {late.round} is closed"
            verdict = Verdict(
                job=late.job, round=late.round, digest=late.payload.sha256, accepted=False, reason=reason
            )
            self._tell(late.device_id, verdict)
        log.info("round %d: closed with %s", close.round, ", ".join(close.devices))
        self._tell_rows()
        self._announce()

    def _dismiss(self, dismiss: Dismiss) -> None:
        log.warning("device %s dismissed: %s", dismiss.device_id, dismiss.reason)
        self._known.discard(dismiss.device_id)
        self._tell(
            dismiss.device_id,
            Finished(job=self._settings.job, reason=dismiss.reason, is_error=dismiss.is_error),
        )

    def _finish(self, finish: Finish, now: float) -> None:
        self._spend(self._bucket, now)
        self._ledger.finish()
        self._is_over = True
        self._tell_rows()
        for device_id in sorted(self._known):
            self._tell(device_id, Finished(job=self._settings.job, reason=finish.reason))
        self._announce()
        log.info("finished: %s", finish.reason)

    def _serve(self, device_id: str, request: Request) -> None:
        outgoing = next((o for o in self._shelf.values() if o.manifest.sha256 == request.sha256), None)
        if outgoing is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not offered")
        capped = msgspec.structs.replace(request, limit=min(request.limit, _REQUEST_LIMIT))
        for chunk in outgoing.chunks(capped):
            self._count(down=len(chunk.data))
            self._tell(device_id, chunk)

    def _outgoing(self, version: int) -> Outgoing:
        found = self._shelf.pop(version, None)
        if found is None or found.manifest.chunk_bytes != self._link.chunk_bytes:
            found = Outgoing(self._ledger.version(version), chunk_bytes=self._link.chunk_bytes)
        self._shelf[version] = found
        while len(self._shelf) > _SHELF:
            del self._shelf[next(iter(self._shelf))]
        return found

    def _folded(self, round_number: int) -> Sums:
        sums = self._strategy.init(self._reference)
        for device_id, num_samples, payload in self._ledger.accepted(round_number):
            values = decode_update(payload, self._reference, codec=self._settings.work.codec)
            sums = self._strategy.add(sums, values, num_samples)
            log.info("round %d: the update of %s is at hand", round_number, device_id)
        return sums

    def _tell_rows(self) -> None:
        while self._next_row <= self.federation.version and self._is_complete(self._next_row):
            self._on_row(self._ledger.row(self._next_row))
            self._next_row += 1

    def _is_complete(self, version: int) -> bool:
        if self._is_over:
            return True
        # Evaluating devices may come a little later than the others: the first row waits for them for a round.
        has_time = self.federation.version > 0 or (self._bucket > 0 and self.federation.has_reports(version))
        return bool(has_time) and self.federation.is_evaluated(version)

    def _announce(self, *, online: bool = True) -> None:
        status = AggregatorStatus(
            job=self._settings.job,
            session=self._session,
            online=online,
            round=self.federation.round,
            version=self.federation.version,
            finished=self.finished,
        )
        send(self._link, aggregator_topic(self._settings.job), encode(status), retain=True)

    def _tell(self, device_id: str, message: Message) -> None:
        send(self._link, device_topic(self._settings.job, device_id, "down"), encode(message))

    def _count(self, *, down: int = 0, up: int = 0) -> None:
        cost = self._cost
        self._cost = msgspec.structs.replace(
            cost, bytes_down=cost.bytes_down + down, bytes_up=cost.bytes_up + up
        )

    def _spend(self, bucket: int, now: float) -> None:
        sent, received = self._link.bytes_sent, self._link.bytes_received
        cost = msgspec.structs.replace(
            self._cost,
            bytes_sent=sent - self._spent_bytes[0],
            bytes_received=received - self._spent_bytes[1],
            seconds=now - self._spent_at,
        )
        self._ledger.spend(bucket, cost)
        self._cost, self._spent_at, self._spent_bytes = Cost(), now, (sent, received)


def _sender(topic: str) -> str:
    parts = topic.split("/")
    try:
        return check_name("device", parts[-2] if len(parts) > 1 else "")
    except ConfigError as exc:
        raise WireError(str(exc)) from exc
