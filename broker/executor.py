"""Carries out what a federation decides: on disk first, then on the wire."""

import logging
from collections.abc import Callable, Iterable

from fleetune.broker.actions import Action, Ask, Close, Dismiss, Finish, Send
from fleetune.broker.job import Settings, device_work
from fleetune.broker.ledger import AFTERWARDS, Ledger, Row
from fleetune.broker.meter import Meter
from fleetune.broker.rounds import Federation
from fleetune.broker.versions import Versions
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Finished,
    Message,
    Offer,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.connection import Connection, send

log = logging.getLogger(__name__)


class Executor:
    """The hands of one job: ledger, versions, messages to devices, the retained status, and the rows told."""

    def __init__(
        self,
        link: Connection,
        ledger: Ledger,
        settings: Settings,
        *,
        federation: Federation,
        versions: Versions,
        meter: Meter,
        session: str,
        on_row: Callable[[Row], object],
    ) -> None:
        """Prepare; arguments as of :class:`fleetune.broker.service.Service`, the other parts those of the same job."""
        self.finished = federation.finished
        """Whether the job is over, and the ledger says so."""
        self._link, self._ledger, self._settings = link, ledger, settings
        self._federation, self._versions, self._meter = federation, versions, meter
        self._session, self._on_row, self._next_row = session, on_row, 0

    def carry_out(self, actions: Iterable[Action], now: float) -> None:
        """Carry out actions in order; StateError if the ledger cannot be read or written."""
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

    def tell(self, device_id: str, message: Message) -> None:
        """Send a device a message."""
        send(self._link, device_topic(self._settings.job, device_id, "down"), encode(message))

    def announce(self, *, online: bool = True) -> None:
        """Publish the aggregator's status, retained."""
        status = AggregatorStatus(
            job=self._settings.job,
            session=self._session,
            online=online,
            round=self._federation.round,
            version=self._federation.version,
            finished=self.finished,
        )
        send(self._link, aggregator_topic(self._settings.job), encode(status), retain=True)

    def tell_rows(self) -> None:
        """Tell the rows that are complete and were not told yet, in order."""
        while self._next_row <= self._federation.version and self._is_complete(self._next_row):
            self._on_row(self._ledger.row(self._next_row))
            self._next_row += 1

    def _ask(self, ask: Ask, now: float) -> None:
        log.info("round %d: asking %s", ask.round, ", ".join(ask.devices))
        self._ledger.ask(ask.round, ask.devices)
        self._meter.turn_to(ask.round, now)

    def _offer(self, sending: Send) -> None:
        download = self._versions.downlink.offer(
            sending.device_id,
            sending.version,
            chunk_bytes=self._link.chunk_bytes,
            exactly=sending.role == "evaluate",
        )
        offer = Offer(
            job=self._settings.job,
            round=sending.round,
            version=sending.version,
            role=sending.role,
            work=device_work(self._settings, round_number=max(sending.round, 1), position=sending.position),
            deadline_s=sending.deadline_s,
            **download._asdict(),
        )
        self.tell(sending.device_id, offer)

    def _close(self, close: Close, now: float) -> None:
        self._meter.turn_to(close.round + 1 if close.round < self._settings.rounds else AFTERWARDS, now)
        self._versions.close(close.round)
        log.info("round %d: closed with %s", close.round, ", ".join(close.devices))
        self.tell_rows()
        self.announce()

    def _dismiss(self, dismiss: Dismiss) -> None:
        log.warning("device %s dismissed: %s", dismiss.device_id, dismiss.reason)
        finished = Finished(job=self._settings.job, reason=dismiss.reason, is_error=dismiss.is_error)
        self.tell(dismiss.device_id, finished)

    def _finish(self, finish: Finish, now: float) -> None:
        self._meter.spend(now)
        self._ledger.finish()
        self.finished = True
        self.tell_rows()
        for device_id in finish.devices:
            self.tell(device_id, Finished(job=self._settings.job, reason=finish.reason))
        self.announce()
        log.info("finished: %s", finish.reason)

    def _is_complete(self, version: int) -> bool:
        if self.finished:
            return True
        # Evaluating devices may come a little later than the others: the first row waits for them for a round.
        federation, reports = self._federation, self._federation.evaluations
        has_time = federation.version > 0 or (federation.round > 0 and reports.has_reports(version))
        return has_time and reports.is_complete(version)
