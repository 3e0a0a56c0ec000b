"""A federation as a state machine: events in, each with its time, actions out; no socket, no clock, no disk.

Actions are to be carried out in order, durably, before the next event: what they leave is what a restart gives back as
:class:`fleetune.broker.store.store.Past`.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from math import inf

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.rounds.actions import Action, Dismiss, Finish
from fleetune.broker.rounds.admission import refusal
from fleetune.broker.rounds.barrier import NO_TURNS, Barrier
from fleetune.broker.rounds.evaluations import Evaluations
from fleetune.broker.store.store import Past
from fleetune.broker.tasks import NOTHING, Declined, Mark, Note, Noted, Outcome, Task, listed
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import (
    CAUSES,
    ROLES,
    Decline,
    Hello,
    MaskMessage,
    Report,
    UpdateReady,
    Verdict,
    default_task_id,
)
from fleetune.device_runtime.errors import WireError

log = logging.getLogger(__name__)

_MEMORY_WORDS = ("memory budget of", "not enough memory")


class Federation:
    """One job: its rounds, its evaluations and its end. A method that takes ``now`` returns the actions that its event causes."""

    def __init__(
        self,
        settings: Settings,
        patience: Patience,
        *,
        now: float,
        past: Past | None = None,
        outcomes: Iterable[Outcome] = (),
        digest_of: Callable[[str], str | None] | None = None,
        evaluators: Collection[str] = (),
        turns: Mapping[str, int] = NO_TURNS,
    ) -> None:
        """Begin, or resume.

        Args:
            settings: the job's.
            patience: how long to wait for what.
            now: the time.
            past: where the job stands.
            outcomes: of all accepted updates, in their order.
            digest_of: of a task's accepted update, None without one; asked of whoever made it durable. By default this
                remembers all.
            evaluators: the devices that may evaluate; empty for all that say so.
            turns: in how many rounds each device was asked before, the open one included.
        """
        past = past or Past()
        self.settings, self.finished = settings, past.finished
        self.rounds = Barrier(settings, patience, now=now, past=past, outcomes=outcomes, turns=turns)
        self.evaluations = Evaluations(
            settings, past.reported, allowed=evaluators, keep_versions=patience.keep_versions
        )
        self.evaluations.advance(past.version, is_last=self.rounds.is_done)
        self._accepted = {} if digest_of else dict(past.accepted)
        self._digest_of = digest_of or self._accepted.get
        self._has_to_remember = digest_of is None
        self._evaluation_s, self._reported_at = patience.evaluation_s or inf, now

    @property
    def round(self) -> int:
        """Number of the open round, or of the last one closed."""
        return self.rounds.round

    @property
    def version(self) -> int:
        """The newest version."""
        return self.rounds.version

    def hello(self, hello: Hello, now: float) -> list[Action]:
        """A device is here, or still here.

        Raises:
            WireError: the role is neither train nor evaluate.
        """
        device = hello.device_id
        if hello.role not in ROLES:
            raise WireError(f"device {device!r}: role {hello.role!r}; expected {' or '.join(ROLES)}")
        if reason := self._unfit(hello):
            return [Dismiss(device, reason)]
        if self.finished:
            return [Dismiss(device, "the job is finished", is_error=False)]
        if hello.role == "evaluate" and not self.evaluations.may(device):
            return [Dismiss(device, "this job's operator has not named it among those that evaluate")]
        if hello.role == "train":
            again = self.rounds.arrive(device, now)
        else:
            again = [*self.evaluations.hello(device)]
        return [*again, *self._advance(now)]

    def offline(self, device_id: str, now: float) -> list[Action]:
        """A device is gone; its place in the round stays until the round is closed."""
        self.rounds.leave(device_id, now)
        self.evaluations.offline(device_id)
        return self._advance(now)

    def silent(self, device_id: str, since: float, now: float) -> list[Action]:
        """A device does not answer, as its connection stands: it counts as gone until anything is heard of it."""
        self.rounds.suspect(device_id, since, now)
        return self._advance(now)

    def paused(self, device_id: str, reason: str) -> None:
        """Note why a device's own rules keep it from working, empty if they do not: while they do, others are asked before it."""
        self.rounds.roster.pause(device_id, reason)

    def marked(self, marks: Iterable[Mark]) -> None:
        """What is noted of devices is durable."""
        for mark in marks:
            if said := self.rounds.quarantine.add(mark):
                log.warning("device %s is %s: %s", mark.device, said, mark.detail)

    def judge(self, update: UpdateReady) -> Verdict | Task:
        """Answer an announced update at once, or return its task if its payload has to be seen; ``task_id`` is filled in."""
        digest = None if self.rounds.owes(update) else self._digest_of(update.task_id)
        if digest == update.payload.sha256:
            return verdict_on(update)
        accepted = {update.task_id} if digest else ()
        reason = refusal(
            update,
            self.rounds.open_round,
            accepted,
            newest_round=self.round,
            num_classes=self.settings.num_classes,
        )
        task, reason = self.rounds.task_of(update), reason or self.rounds.update_refusal(update)
        return verdict_on(update, reason or "it answers no task") if reason or task is None else task

    def accepted(self, update: UpdateReady, now: float, noted: Noted = NOTHING) -> list[Action]:
        """The payload of an update that ``judge`` passed is good, and durable, with what was noted of it."""
        if self._has_to_remember:
            self._accepted[update.task_id] = update.payload.sha256
        self.rounds.accepted(update, noted)
        return self._advance(now)

    def refused(self, update: UpdateReady, reason: str, now: float) -> list[Action]:
        """The payload of an update that ``judge`` passed is bad: the round goes on without it."""
        self.rounds.refused(update, reason)
        return self._advance(now)

    def masked(self, message: MaskMessage, note: Note | None, now: float) -> list[Action]:
        """A message about masks that ``rounds`` does not refuse; what is new of it, ``note``, is durable."""
        return [*self.rounds.masked(message.device_id, note, now), *self._advance(now)]

    def again(self, device_id: str, now: float) -> list[Action]:
        """What a device owes, to be offered to it once more."""
        return self.rounds.arrive(device_id, now)

    def owed(self, decline: Decline) -> Task | None:
        """The training task that a device declines and still owes: that has to be durable before ``declined``."""
        return self.rounds.owed(decline.device_id, _train_id(decline))

    def declined(self, decline: Decline, now: float) -> list[Action]:
        """A device cannot do what it was asked to do: nobody waits for it."""
        device, number, named = decline.device_id, decline.round, decline.task_id
        again = self.evaluations.declined(device, named or default_task_id("evaluate", number, device))
        self.rounds.declined(device, _train_id(decline), Declined(cause_of(decline), decline.reason))
        return [*again, *self._advance(now)]

    def reported(self, report: Report, now: float) -> list[Action]:
        """A report that ``evaluations.judge`` passed is durable."""
        self._reported_at = now
        return [*self.evaluations.reported(report), *self._advance(now)]

    def report_refused(self, report: Report, now: float) -> list[Action]:
        """A report that ``evaluations.judge`` did not pass: nobody waits for another on its version."""
        again = self.evaluations.declined(report.device_id, report.task_id)
        return [*again, *self._advance(now)]

    def tick(self, now: float) -> list[Action]:
        """Time has passed.

        Raises:
            TransportError: the round has been extended too often.
            ConfigError: no device here can do any of the work that there is.
        """
        return self._conclude(self.rounds.tick(now), now)

    def due_at(self) -> float:
        """Time at which ``tick`` has something to do, if nothing happens before; inf for never."""
        if not self.rounds.is_done:
            return self.rounds.due_at()
        is_waiting = not self.finished and self.evaluations.num_silent(self.version)
        return self._patient_until if is_waiting else inf

    @property
    def _patient_until(self) -> float:
        return max(self.rounds.since, self._reported_at) + self._evaluation_s

    def _unfit(self, hello: Hello) -> str:
        if hello.artifact != self.settings.artifact:
            return f"its artifact is {hello.artifact[:12]}, this job's is {self.settings.artifact[:12]}"
        return "it has no samples" if hello.num_samples < 1 else ""

    def _advance(self, now: float) -> list[Action]:
        return self._conclude(self.rounds.advance(now), now)

    def _conclude(self, actions: list[Action], now: float) -> list[Action]:
        offers = self.evaluations.advance(self.version, is_last=self.rounds.is_done)
        return [*actions, *offers, *self._finish(now)]

    def _finish(self, now: float) -> list[Action]:
        if self.finished or not self.rounds.is_done:
            return []
        if self.evaluations.num_silent(self.version):
            if now < self._patient_until:
                return []
            silent = self.evaluations.silent(self.version)
            log.warning("finished without the last evaluation of %s", listed(silent))
        self.finished = True
        here = tuple(sorted({*self.rounds.roster.present, *self.evaluations.present}))
        why = f"; {self.rounds.early_end}" if self.rounds.early_end else ""
        return [Finish(f"{self.rounds.closed} rounds are done{why}", here)]


def cause_of(decline: Decline) -> str:
    """Why a device declines, one of CAUSES: one of release 0.1.0 says it in words alone."""
    if decline.cause or not decline.reason.startswith(_MEMORY_WORDS):
        return decline.cause if decline.cause in CAUSES else ""
    return "memory"


def _train_id(decline: Decline) -> str:
    return decline.task_id or default_task_id("train", decline.round, decline.device_id)


def verdict_on(update: UpdateReady, reason: str = "") -> Verdict:
    """The answer to an update: refused for ``reason``, or accepted without one."""
    return Verdict(
        job=update.job,
        task_id=update.task_id,
        round=update.round,
        digest=update.payload.sha256,
        accepted=not reason,
        reason=reason[:REASON_CHARS_MAX],
    )
