"""A device's life: messages in, messages out, work while its rules allow it; no thread, clock or socket."""

import logging
from math import inf

from fleetune.device_runtime.agent.assignments import Assignments
from fleetune.device_runtime.agent.deliveries import Deliveries
from fleetune.device_runtime.agent.events import NO_ROUND, Event
from fleetune.device_runtime.agent.guard import guard_of
from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.presence import Presence
from fleetune.device_runtime.agent.telling import Progress, Telling
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.mask_messages import MaskAsk, MaskGroup, MaskInbox
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Finished,
    Message,
    Offer,
    Request,
    Verdict,
    decode,
)
from fleetune.device_runtime.errors import FleetuneError, WireError
from fleetune.device_runtime.network.complaints import Complaints
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.rules.rules import Reading, Rules

log = logging.getLogger(__name__)

AWAY = "away; waiting for it"
_MESSAGES_A_POLL = 64


class Agent:
    """One device for one job. Call ``poll`` after every message, and at ``due_at`` if none comes before."""

    def __init__(self, home: Home, workbench: Workbench, *, gate: Gate | None = None) -> None:
        """Prepare.

        Args:
            home: the device's.
            workbench: what it trains and evaluates with.
            gate: when it may work; by default always.
        """
        self.finished = ""
        """Why the device may stop; empty as long as it may not."""
        self.is_unwanted = False
        """Whether it may stop because the aggregator cannot use it."""
        self._link, self._identity, self._on_event = home.link, home.identity, home.on_event
        home.outbox.claim(home.identity.job, home.identity.artifact)
        self._told_of_aggregator = ""
        self._deliveries = Deliveries(home)
        self._assignments = Assignments(home, workbench, self._deliveries)
        self._telling = Telling(home, self._progress, lambda: self._assignments.said)
        self._presence = Presence(home, self._telling, num_samples=workbench.num_samples)
        self._gate = gate or Gate(Rules(), Reading)
        self._shut_by: tuple[str, ...] = ()
        self._complaints = Complaints()
        self._guard = guard_of(home)

    @property
    def heard_at(self) -> float:
        """When the last message came."""
        return self._presence.heard_at

    @property
    def has_status(self) -> bool:
        """Whether the aggregator's status was heard in this life."""
        return self._presence.is_met

    @property
    def is_paused(self) -> bool:
        """Whether its rules keep it from the work it has."""
        waits_for_chunks = self._assignments.is_fetching and not self._must_be_quiet
        return bool(self._gate.reasons) and not self._assignments.is_idle and not waits_for_chunks

    def poll(self, now: float) -> bool:
        """Take what has come, announce what is due, do one step of work; True if there is more to do at once."""
        self._mind_rules(now)
        self._greet(now)
        if now >= self._telling.due_at:
            self._presence.tell_status(now, paused=self._gate.text)
        self._assignments.listen(is_quiet=self._must_be_quiet)
        for _ in range(_MESSAGES_A_POLL):
            message = self._link.receive(0.0)
            if message is None:
                break
            self.take(*message, now)
        self._assignments.masking.announce(now)
        if not self._must_be_quiet:
            self._deliveries.announce(now)
        return not self.finished and self._work(now)

    def due_at(self, now: float) -> float:
        """Time from which ``poll`` has something to do even if no message comes: ``now`` or before for at once, inf for never."""
        return inf if self.finished else min(self.talk_due_at(now), self._work_due_at(now))

    def talk_due_at(self, now: float) -> float:
        """As ``due_at``, of all but work: for who has the work done elsewhere."""
        if self.finished:
            return inf
        work = self._assignments
        greeting = now if work.must_greet else self._presence.due_at(waits_until=work.waits_until)
        transfer = inf if self._must_be_quiet else min(self._deliveries.due_at, work.fetch_due_at)
        return min(self._gate.due_at, greeting, transfer, work.masking.due_at, self._telling.due_at)

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message; one that is bad, or that anything goes wrong with, is dropped; of many some have a line in the log.

        Raises:
            FleetuneError: not the message is at fault, but the disk or what is on it.
        """
        is_shared = self._assignments.listening.hears(topic)
        if not (is_shared or topic in self._identity.topics) or not payload:
            # A status was cleared, a part of a stream is whole; or amqtt 0.12, which was seen to deliver retained statuses to
            # clients that did not ask.
            return
        with self._complaints.dropping(topic, topic, now, ours=(FleetuneError, OSError, MemoryError)):
            if is_shared:
                self._overhear(decode(payload), now)
            elif message := self._guard.open(topic, payload, now):
                self._dispatch(message, now)

    def _mind_rules(self, now: float) -> None:
        self._gate.is_open(now)
        forbidding = tuple(self._gate.reasons)
        if forbidding == self._shut_by:
            return
        self._shut_by = forbidding
        self._presence.tell_status(now, paused=self._gate.text)
        kind, number = "paused" if forbidding else "resumed", max(self._assignments.newest_round, 0)
        self._on_event(Event(kind, number, text=self._gate.text))
        if forbidding:
            self._assignments.checkpoint()

    @property
    def _must_be_quiet(self) -> bool:
        """Whether the network is one over which nothing but small messages may go."""
        return "network" in self._gate.reasons

    def _greet(self, now: float) -> None:
        work = self._assignments
        if work.must_greet:
            work.must_greet = False
            self._presence.rush()
        told = self._presence.greet(
            now,
            version=work.version,
            holds=work.reference,
            mask=work.held_mask,
            waits_until=work.waits_until,
            paused=self._gate.text,
            original=work.original,
            listens=work.listening.is_of_use,
        )
        if told:
            self._deliveries.rush()
            work.masking.rush()
        if told and self._presence.was_away:
            work.restart(now)

    def _dispatch(self, message: Message, now: float) -> None:
        job = getattr(message, "job", self._identity.job)
        if job != self._identity.job:
            raise WireError(f"it names job {job[:64]!r}; this device is in {self._identity.job!r}")
        if not isinstance(message, Chunk) or self._assignments.is_fetching:
            self._presence.heard(now)  # a chunk that nobody waits for is no word of the aggregator
        match message:
            case AggregatorStatus():
                self._heard(message, now)
            case Offer():
                if self._guard.admits(message, now):
                    self._assignments.take(message, now)
                    self._telling.begins(now)
            case Chunk():
                self._assignments.add(message, now)
            case Request():
                self._serve(message, now)
            case MaskGroup() | MaskInbox() | MaskAsk():
                self._assignments.take_masks(message)
            case Verdict():
                self._assignments.settle(message)
            case Finished():
                self._finish(message.reason or "the job is over", is_unwanted=message.is_error)
            case _:
                raise WireError(f"a device takes no {type(message).__name__}")

    def _overhear(self, message: Message, now: float) -> None:
        """Take a chunk of a stream, whose digest is in an offer that was taken; nothing else is said there."""
        if not isinstance(message, Chunk):
            raise WireError(f"a stream has chunks only, and this is {type(message).__name__}")
        self._assignments.listening.heard()
        self._dispatch(message, now)

    def _serve(self, request: Request, now: float) -> None:
        if not self._must_be_quiet:
            self._deliveries.serve(request, now)

    def _progress(self) -> Progress:
        at = self._assignments.progress
        return at._replace(phase="delivering") if at.phase == "idle" and len(self._deliveries) else at

    def _heard(self, status: AggregatorStatus, now: float) -> None:
        if self.finished:
            return
        if status.session:
            self._telling.looked_at(status.tell_every_s, now)
        if status.finished and self._presence.has_met and not self._presence.has_left(status.session):
            self._finish("the job is over", is_unwanted=False, session=status.session)
        elif status.finished:
            log.warning("job %s was over before this device started; it waits for more", self._identity.job)
        elif status.online:
            if self._presence.meet(status.session, now):
                self._assignments.renew()
                self._told_of_aggregator = ""
            elif self._told_of_aggregator == AWAY:
                self._presence.return_to(now)  # a hello while it was away is lost, and perhaps more
            self._tell_of_aggregator("here")
        elif status.session:
            self._tell_of_aggregator(AWAY)

    def _tell_of_aggregator(self, text: str) -> None:
        if text != self._told_of_aggregator:
            self._told_of_aggregator = text
            self._on_event(Event("aggregator", NO_ROUND, text=text))

    def _work(self, now: float) -> bool:
        work, is_shut = self._assignments, bool(self._gate.reasons)
        if is_shut and now >= work.overdue_at:
            work.decline(f"paused: {self._gate.text}")
            return False
        if work.is_fetching:
            return not self._must_be_quiet and work.fetch(now)
        return not is_shut and work.step()

    def _work_due_at(self, now: float) -> float:
        if self._gate.reasons:
            return self._assignments.overdue_at
        return now if self._assignments.has_step else inf

    def _finish(self, reason: str, *, is_unwanted: bool, session: str = "") -> None:
        if self.finished:
            return
        if not is_unwanted:
            self._presence.leave(session)
        self._guard.close()
        self.finished, self.is_unwanted = reason, is_unwanted
        self._assignments.stop()
        self._on_event(Event("finished", self._assignments.newest_round, text=reason))
