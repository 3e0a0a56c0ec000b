"""The synchronous scheduler: a round opens for a number of devices, and closes when each has answered, or is gone, or is late.

A round starts from the newest version and closes into the next.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from math import inf

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import MASKS, Settings
from fleetune.broker.methods.accounting import rounds_within
from fleetune.broker.methods.selection import SELECTIONS, Roster, seeded
from fleetune.broker.rounds.actions import Action, Assign, Close, Enrol, Repeat
from fleetune.broker.rounds.admission import identity
from fleetune.broker.rounds.budget import Budget, why_ended
from fleetune.broker.rounds.chooser import Chooser
from fleetune.broker.rounds.mask_turns import is_hopeless, leave_out_slow, update_refusal, why_anew
from fleetune.broker.rounds.masked_round import REVEALS, UPDATES, MaskedRound, note_of
from fleetune.broker.rounds.open_round import OpenRound, Standing
from fleetune.broker.rounds.quarantine import Quarantine
from fleetune.broker.rounds.quorum import Quorum
from fleetune.broker.store.store import Past, accepted_outcome
from fleetune.broker.tasks import NOTHING, Declined, Note, Noted, Outcome, Task, listed
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import MaskMessage, UpdateReady
from fleetune.device_runtime.errors import ConfigError, TransportError

log = logging.getLogger(__name__)

NO_TURNS: Mapping[str, int] = {}
_SPENT = "its part of the privacy budget is spent"


class Barrier:
    """Who is asked what in which round, and when it closes. No event takes longer for more devices, but opening and closing."""

    def __init__(
        self,
        settings: Settings,
        patience: Patience,
        *,
        now: float,
        past: Past,
        outcomes: Iterable[Outcome],
        turns: Mapping[str, int] = NO_TURNS,
    ) -> None:
        """Begin, or resume from ``past`` with the ``outcomes`` of all accepted updates, in their order.

        ``turns`` says in how many rounds each device was asked, the open one included.
        """
        self.version, self.closed = past.version, past.closed
        self.since = self._began = now
        """When the last round was closed, or this began."""
        self.roster = Roster(SELECTIONS[settings.selection])
        self.quarantine = Quarantine(settings.strikes if settings.secure != MASKS else 0, past.marks)
        """Who is not asked for a while; under masks nobody is left out, and nobody excused."""
        self.quorum = Quorum(settings, self.roster, self.quarantine)
        self._settings, self._patience, self._gathered = settings, patience, False
        self._silent: set[str] = set()
        """Devices whose connections stand and that do not answer."""
        self._seen: set[str] = set()
        """Devices that were here to train, in this life or before."""
        self._chooser = Chooser(settings, patience)
        self._budget = Budget(rounds_within(settings.dp, settings.work), turns)
        self.early_end = ""
        """Why no further round begins, though there were more to come; empty as long as they may."""
        for outcome in outcomes:
            self._learn(outcome)
        self.masks: MaskedRound | None = None
        """Those of the open round, if its updates are masked."""
        self._repeats = 0
        self._advanced_at = -inf
        """What time brings about by then is done."""
        self.open_round = self._restored(past, now) if past.tasks and not self.is_done else None
        """The round that is open, if one is."""

    @property
    def round(self) -> int:
        """Number of the open round, or of the last one closed."""
        return self.open_round.number if self.open_round else self.closed

    @property
    def deadline(self) -> float:
        """When the open round is over; inf for never, and if none is open."""
        return self.open_round.deadline if self.open_round else inf

    @property
    def is_done(self) -> bool:
        """Whether all rounds are closed, or no further one may begin."""
        return self.closed >= self._settings.rounds or bool(self.early_end)

    def wanted(self, now: float) -> int:
        """How many devices that may be asked have to be here for a round to open."""
        is_late = self._gathered or now >= self.since + self._gather_s
        wanted = self._settings.min_clients if is_late else self._settings.clients
        return self.quorum.less_excused(self.closed + 1, wanted)

    def task(self, device_id: str) -> Task | None:
        """What a device was asked to do in the open round, if it was."""
        return self.open_round.tasks.get(device_id) if self.open_round else None

    def task_of(self, update: UpdateReady) -> Task | None:
        """The task of the open round that an update answers, if there is one."""
        task = self.task(update.device_id)
        return task if task and task.task_id == update.task_id else None

    def owes(self, update: UpdateReady) -> bool:
        """Whether an update answers a task of the open round that has none: the ledger need not be asked."""
        if self.open_round is None or self.task_of(update) is None:
            return False
        return self.open_round.standing(update.device_id) is not Standing.ACCEPTED

    def arrive(self, device_id: str, now: float) -> list[Action]:
        """A device is here, or still here: offer again what it still owes."""
        self._seen.add(device_id)
        self._budget.see(device_id)
        self.hear(device_id)
        if device_id in self.roster.barred:
            return []
        if self._budget.is_spent(device_id) and not self.task(device_id):
            self.roster.bar(device_id, _SPENT)
        is_asked = self.task(device_id) and self.open_round and device_id not in self.open_round.again
        self.roster.arrive(device_id, is_asked=bool(is_asked))
        again: list[Action] = self.masks.retell(device_id) if self.masks else []
        if self.open_round and self.open_round.standing(device_id) is Standing.PENDING:
            return [*self._offers(self.open_round, (device_id,), now), *again]
        return again

    def hear(self, device_id: str) -> None:
        """A device that has said anything but goodbye is there."""
        if device_id in self._silent:
            self._silent.discard(device_id)
            self.roster.arrive(device_id, is_asked=self.task(device_id) is not None)
        if self.open_round:
            self.open_round.find(device_id)
        if self.masks:
            self.masks.find(device_id)

    def leave(self, device_id: str, now: float, *, since: float = inf) -> None:
        """A device is gone: the round waits for it no longer than the grace, if it has enough updates or others to ask."""
        self._silent.discard(device_id)
        self.roster.leave(device_id)
        if self.open_round:
            self.open_round.lose(device_id, min(since, now))
        if self.masks:
            self.masks.lose(device_id, now)

    def suspect(self, device_id: str, since: float, now: float) -> None:
        """A device does not answer: as if it were gone since then, until it is heard."""
        if device_id not in self.roster:
            return
        log.warning("device %s does not answer: nobody waits for it until it does", device_id)
        self.leave(device_id, now, since=since)
        self._silent.add(device_id)

    def mask_refusal(self, message: MaskMessage) -> str:
        """Say why a device's message about masks cannot be taken; empty if it can, or was before."""
        return self.masks.refusal(message) if self.masks else "no update is masked now"

    def mask_note(self, message: MaskMessage) -> Note | None:
        """What is to be kept of a message that is not refused; None if it is known already."""
        return note_of(message) if self.masks and self.masks.is_new(message) else None

    def masked(self, device_id: str, note: Note | None, now: float) -> list[Action]:
        """A device said something about masks, and what is new of it is durable; nothing new: tell it what it lacks."""
        if self.masks and note:
            self.masks.take(note, now)
        return self.masks.retell(device_id) if self.masks and not note else []

    def update_refusal(self, update: UpdateReady) -> str:
        """Say why an update cannot be in a sum under masks; empty if it can, or there are none."""
        return update_refusal(self.masks, update) if self.masks and self.task_of(update) else ""

    def accepted(self, update: UpdateReady, noted: Noted = NOTHING) -> None:
        """An update is good, and durable, with what was noted of it."""
        if self.open_round and (task := self.task_of(update)):
            self.open_round.stand(task.device_id, Standing.ACCEPTED)
            self._learn(accepted_outcome(task, update, noted))

    def refused(self, update: UpdateReady, reason: str) -> None:
        """An update is bad: the round goes on without it, but a better one is welcome."""
        if self.open_round and self.task_of(update):
            self.open_round.stand(update.device_id, Standing.REFUSED)
            self.open_round.refuse(update.device_id, identity(update), reason[:REASON_CHARS_MAX])

    def owed(self, device_id: str, task_id: str) -> Task | None:
        """The task of the open round that a device still owes, if it is this one."""
        task, open_round = self.task(device_id), self.open_round
        is_owed = open_round and open_round.standing(device_id) is Standing.PENDING
        return task if is_owed and task and task.task_id == task_id else None

    def declined(self, device_id: str, task_id: str, said: Declined) -> None:
        """A device cannot do its task, durably noted: it is asked for something else, or the round goes on without it."""
        task, open_round = self.owed(device_id, task_id), self.open_round
        if open_round and task:
            self._learn(Outcome(device_id, task.work, {}, said.cause, task.round))
            self._budget.take(device_id, -1)
            self._put_aside(open_round, task, said)

    def advance(self, now: float) -> list[Action]:
        """Do what the events so far call for."""
        self._advanced_at = now
        actions: list[Action] = []
        if self.open_round:
            actions += self._ask_more(self.open_round, now)
            actions += self._mask(self.open_round, now)
            actions += self._close_if_complete(self.open_round, now)
        if not self.open_round and not self.is_done:
            self._mind_budget(now)
        if not self.open_round and not self.is_done:
            actions += self._open(now)
        return actions

    def tick(self, now: float) -> list[Action]:
        """Time has passed.

        Raises:
            TransportError: the round has been extended too often.
            ConfigError: no device here can do any of the work that there is, or all decline it for good.
        """
        if self._is_deserted:
            raise ConfigError(self._desertion())
        if self._is_declined:
            raise ConfigError(
                f"{self.declined_by()}; where that has changed the same command resumes the job"
            )
        late = self.open_round if self.open_round and self.open_round.deadline <= now else None
        return [*(self._end_of_time(late, now) if late else ()), *self.advance(now)]

    def due_at(self) -> float:
        """Time at which ``tick`` has something to do, if nothing happens before; inf for never."""
        if self._is_deserted or self._is_declined:
            return -inf
        if self.open_round:
            lost_by = self.open_round.lost_by(self._patience.grace_s)
            soon = lost_by if lost_by > self._advanced_at else inf
            return min(self.open_round.deadline, soon, self._masks_due_at)
        number = self.closed + 1
        is_enough = not self._gathered and self.quorum.num_fit(number) >= self.quorum.least(number)
        if self._budget_runs_out and not self.is_done:
            return self._began + self._patience.gather_s
        return self.since + self._gather_s if is_enough and not self.is_done else inf

    @property
    def _masks_due_at(self) -> float:
        if self.masks is None:
            return inf
        lost_by = self.masks.lost_by(self._patience.grace_s)
        return min(self.masks.due_at, lost_by if lost_by > self._advanced_at else inf)

    @property
    def _budget_runs_out(self) -> bool:
        """Whether fewer devices than a round needs may be asked again, as far as is known."""
        return self._budget.runs_out(self._settings.min_clients)

    def _mind_budget(self, now: float) -> None:
        """Ask those no more who have been asked as often as they may be; end the job if too few are left.

        At first others may be on their way, after a restart too: they are waited for as those of the first round are.
        """
        for device in self._budget.take_newly_spent():
            if device in self.roster:  # another is barred when it comes
                self.roster.bar(device, _SPENT)
        if self._budget_runs_out and now >= self._began + self._patience.gather_s:
            self.early_end = why_ended(self._budget, self._settings)

    @property
    def _gather_s(self) -> float:
        return self._patience.gather_s or inf

    def _restored(self, past: Past, now: float) -> OpenRound:
        restored = OpenRound(past.tasks[0].round, self._deadline(now), first=past.first)
        counting = [task for task in past.tasks if task.position >= past.first]
        for task in counting:
            restored.add([task])
            if task.task_id in past.accepted:
                restored.stand(task.device_id, Standing.ACCEPTED)
            elif said := past.declined.get(task.task_id):
                self._put_aside(restored, task, said)
        if restored.is_declined and restored.count(Standing.ACCEPTED) < self._settings.min_clients:
            restored.forgive()  # the job ended over it: what they allow may be another now
        self._begin_masks(restored, now)
        if self.masks:
            self.masks.ask(restored.tasks.values())
            for note in past.notes:
                self.masks.take(note, now)
            leave_out_slow(restored, self.masks)
        return restored

    def _begin_masks(self, open_round: OpenRound, now: float) -> None:
        settings, number = self._settings, open_round.number
        if settings.secure == MASKS:
            self.masks = MaskedRound(settings, self._patience, number=number, first=open_round.first, now=now)

    def _mask(self, open_round: OpenRound, now: float) -> list[Action]:
        """Go on with the masks of the open round; if too few can have any, begin it anew."""
        if self.masks is None:
            return []
        actions = self.masks.advance(open_round.waited_for(now, self._patience.grace_s), now)
        leave_out_slow(open_round, self.masks)
        is_over = is_hopeless(
            open_round, self.masks, self._settings.min_clients
        ) or self.masks.is_out_of_reach(now, self._patience.grace_s)
        return [*actions, *(self._repeat(open_round, now) if is_over else ())]

    def _repeat(self, open_round: OpenRound, now: float) -> list[Action]:
        """Give the attempt up: masks that were told of are never used again, so everyone trains and masks anew.

        Raises:
            TransportError: that was done too often.
        """
        number, self._repeats = open_round.number, self._repeats + 1
        if self._repeats > self._patience.extensions_max:
            raise TransportError(
                f"round {number}: {self._repeats} sums under masks failed; the same command resumes the job"
            )
        if self.masks:
            log.warning("round %d: %s; it begins anew", number, why_anew(self.masks))
        self.open_round = OpenRound(number, self._deadline(now), first=open_round.num_asked)
        self.roster.release()
        self._begin_masks(self.open_round, now)
        return [Repeat(number, self.open_round.first), *self._ask(self.open_round, now)]

    def _put_aside(self, open_round: OpenRound, task: Task, said: Declined) -> None:
        """Go on without a task that was declined; its device may be asked for another, or for nothing any more."""
        device = task.device_id
        choice = self._chooser.choice(open_round.number, open_round.num_asked, device)
        again = choice.work is not None and choice.work.policy != task.work.policy
        open_round.decline(device, said, again=again)
        if choice.work is None:
            self._bar(device, choice.reason)
        elif again and device in self.roster:
            self.roster.arrive(device, is_asked=False)

    def _bar(self, device: str, reason: str) -> None:
        log.warning("device %s is asked no more: %s", device, reason)
        self.roster.bar(device, reason)

    @property
    def _is_deserted(self) -> bool:
        """Whether all devices that were here can do nothing of what there is, and nobody is at work."""
        is_at_work = self.open_round and (
            self.open_round.count(Standing.PENDING) or self.open_round.count(Standing.ACCEPTED)
        )
        is_everyone = self._seen <= self.roster.barred.keys() and bool(self._seen)
        is_over = self.is_done or self._budget_runs_out
        return is_everyone and not len(self.roster) and not is_at_work and not is_over

    def _desertion(self) -> str:
        barred = [f"{device}: {reason}" for device, reason in sorted(self.roster.barred.items())]
        return f"no device is left that can do any of the work: {listed(barred)}"

    def declined_by(self) -> str:
        """Say who declined for good where the open round lacks updates that nobody here will make; else nothing."""
        found = self.open_round
        if found is None or not found.is_declined:
            return ""
        have, least = found.count(Standing.ACCEPTED), self.quorum.least(found.number)
        said = (
            f"round {found.number}: {have} of at least {least} updates, and declined by {found.declined_by()}"
        )
        return said if have < least else ""

    @property
    def _is_declined(self) -> bool:
        """Whether that is so, and no device is known that was not asked."""
        found = self.open_round
        return found is not None and bool(self.declined_by()) and self._seen <= found.tasks.keys()

    def _deadline(self, now: float) -> float:
        return now + (self._patience.deadline_s or inf)

    def _open(self, now: float) -> list[Action]:
        if self.quorum.num_fit(self.closed + 1) < self.wanted(now):
            return []
        self._gathered = True
        self.open_round = OpenRound(self.closed + 1, self._deadline(now))
        self._begin_masks(self.open_round, now)
        return self._ask(self.open_round, now)

    def _ask_more(self, open_round: OpenRound, now: float) -> list[Action]:
        if self._is_of_head(open_round):
            return self._ask(open_round, now)
        if self.masks:
            is_short = open_round.count(Standing.PENDING) < self._settings.min_clients
            return self._ask(open_round, now) if is_short and self.masks.is_taking_devices else []
        enough = open_round.count(Standing.ACCEPTED) >= self._settings.min_clients
        return self._ask(open_round, now) if not enough and self._has_heard_all(open_round, now) else []

    def _ask(self, open_round: OpenRound, now: float) -> list[Action]:
        """Ask as many as are lacking of those here who were not asked in this round; for the head all of them."""
        lacking = self._settings.clients - open_round.count(Standing.ACCEPTED)
        if self._is_of_head(open_round):
            lacking = len(self.roster)
        elif self.masks:
            lacking -= open_round.count(Standing.PENDING)
        draw = seeded(self._settings.seed, round_number=open_round.number, asked=open_round.num_asked)
        is_left_out = partial(self.quarantine.holds, number=open_round.number)
        devices = self.roster.take(max(lacking, 0), draw, is_left_out=is_left_out)
        tasks, unable = self._chooser.tasks(open_round, devices, version=self.version)
        for device, reason in unable.items():
            self._bar(device, reason)
        if not tasks:
            return []
        open_round.add(tasks)
        for task in tasks:
            self._budget.take(task.device_id)
        if self.masks:
            self.masks.ask(tasks)
        return [Enrol(tuple(tasks)), *self._offers(open_round, [task.device_id for task in tasks], now)]

    def _learn(self, outcome: Outcome) -> None:
        self._seen.add(outcome.device_id)
        self._chooser.learn(outcome)

    def _is_of_head(self, open_round: OpenRound) -> bool:
        return open_round.number <= self._settings.head_rounds

    def _offers(self, open_round: OpenRound, devices: Iterable[str], now: float) -> list[Assign]:
        left_s = max(open_round.deadline - now, 0.0) if self._patience.deadline_s else 0.0
        return [Assign(open_round.tasks[device], left_s) for device in devices]

    def _close_if_complete(self, open_round: OpenRound, now: float) -> list[Action]:
        is_enough = open_round.count(Standing.ACCEPTED) >= self.quorum.least(open_round.number)
        is_late = self.masks is not None and self.masks.phase == REVEALS
        if not is_enough or not (is_late or self._has_heard_all(open_round, now)):
            return []
        if not is_late and (gone := open_round.of(Standing.PENDING)):
            log.warning("round %d goes on without %s: gone", open_round.number, listed(gone))
        return self._close(open_round, now)

    def _has_heard_all(self, open_round: OpenRound, now: float) -> bool:
        """Whether every device that was asked has answered, or is gone for longer than the grace."""
        return not open_round.num_living and open_round.lost_by(self._patience.grace_s) <= now

    def _close(self, open_round: OpenRound, now: float) -> list[Action]:
        """Close a round; one under masks first asks for the shares that take them off."""
        unmasking = None
        if self.masks:
            if self.masks.phase == UPDATES:
                return self._ask_for_shares(open_round, self.masks, now)
            if (unmasking := self.masks.unmasking()) is None:
                return []
        self.open_round, self.masks, self._repeats = None, None, 0
        self.closed, self.version, self.since = open_round.number, self.version + 1, now
        self.roster.release()
        made, lost = (tuple(sorted(open_round.of(s))) for s in (Standing.ACCEPTED, Standing.PENDING))
        return [Close(self.closed, self.version, made, lost, unmasking)]

    def _ask_for_shares(self, open_round: OpenRound, masks: MaskedRound, now: float) -> list[Action]:
        """Take no more updates under masks; where those that came cannot be unmasked, begin anew."""
        delivered = open_round.of(Standing.ACCEPTED)
        if not masks.can_unmask(delivered):
            return self._repeat(open_round, now)
        open_round.deadline = self._deadline(now)
        log.info("round %d: asking %s for shares of masks", open_round.number, listed(delivered))
        return masks.close(delivered)

    def _end_of_time(self, open_round: OpenRound, now: float) -> list[Action]:
        num_accepted = open_round.count(Standing.ACCEPTED)
        wanted = self.quorum.least(open_round.number, deadline_of=open_round)
        late = open_round.of(Standing.PENDING)
        is_unmasking = self.masks and self.masks.phase == REVEALS
        if num_accepted >= wanted and not is_unmasking:
            log.warning("round %d closes at its deadline without %s", open_round.number, listed(late))
            return self._close(open_round, now)
        if self.masks and not self.masks.is_taking_devices:
            return self._repeat(open_round, now)
        have = f"round {open_round.number}: {num_accepted} of at least {wanted} updates at its deadline"
        if open_round.extensions >= self._patience.extensions_max:
            why = f"; declined: {open_round.declined_by()}" if open_round.declines else ""
            raise TransportError(
                f"{have}, after {open_round.extensions} extensions{why}; the same command resumes the job"
            )
        open_round.extensions += 1
        open_round.deadline = self._deadline(now)
        log.warning("%s: extended by %g s", have, self._patience.deadline_s)
        return [*self._offers(open_round, late, now), *self._ask(open_round, now)]
