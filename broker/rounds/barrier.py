"""The synchronous scheduler: a round opens for a number of devices, and closes when each has answered or its time is over.

A round starts from the newest version and closes into the next.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from math import inf

from fleetune.broker.job import MASKS, Patience, Settings, device_work
from fleetune.broker.methods.accounting import rounds_within
from fleetune.broker.methods.configurators import CONFIGURATORS, Candidate, Choice
from fleetune.broker.methods.selection import SELECTIONS, Roster, seeded
from fleetune.broker.methods.traffic import TRAFFIC, laid_over
from fleetune.broker.rounds.actions import Action, Assign, Close, Enrol, Repeat
from fleetune.broker.rounds.admission import identity
from fleetune.broker.rounds.budget import Budget
from fleetune.broker.rounds.masked_round import REVEALS, SHARES, UPDATES, MaskedRound, note_of
from fleetune.broker.rounds.open_round import OpenRound, Standing
from fleetune.broker.rounds.quarantine import Quarantine
from fleetune.broker.store.store import Past, accepted_outcome
from fleetune.broker.tasks import NOTHING, Note, Noted, Outcome, Task, listed
from fleetune.broker.tasks import REASON_CHARS_MAX as WHY_CHARS_MAX
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import MaskMessage, UpdateReady, default_task_id
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TransportError, one_line

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
        self._settings, self._patience, self._gathered = settings, patience, False
        self._configurator = CONFIGURATORS[settings.configurator]()
        self._seen: set[str] = set()
        """Devices that were here to train, in this life or before."""
        self._learned = self._configurator.init(settings)
        self._traffic = TRAFFIC[settings.traffic]()
        self._carried = self._traffic.init(settings)
        self._budget = Budget(rounds_within(settings.dp, settings.work), turns)
        self.early_end = ""
        """Why no further round begins, though there were more to come; empty as long as they may."""
        for outcome in outcomes:
            self._learn(outcome)
        self.masks: MaskedRound | None = None
        """Those of the open round, if its updates are masked."""
        self._repeats = 0
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
        return wanted - self._num_excused(self.closed + 1, wanted)

    def num_fit(self, number: int) -> int:
        """How many devices are here that may be asked in a round."""
        return len(self.roster) - len(self._left_out(number))

    def task(self, device_id: str) -> Task | None:
        """What a device was asked to do in the open round, if it was."""
        return self.open_round.tasks.get(device_id) if self.open_round else None

    def task_of(self, update: UpdateReady) -> Task | None:
        """The task of the open round that an update answers, if there is one."""
        task = self.task(update.device_id)
        return task if task and task.task_id == update.task_id else None

    def arrive(self, device_id: str, now: float) -> list[Action]:
        """A device is here, or still here: offer again what it still owes."""
        self._seen.add(device_id)
        self._budget.see(device_id)
        if device_id in self.roster.barred:
            return []
        if self._budget.is_spent(device_id) and not self.task(device_id):
            self.roster.bar(device_id, _SPENT)
        is_asked = self.open_round and device_id in self.open_round.tasks.keys() - self.open_round.again
        self.roster.arrive(device_id, is_asked=bool(is_asked))
        again: list[Action] = self.masks.retell(device_id) if self.masks else []
        if self.open_round and self.open_round.standing(device_id) is Standing.PENDING:
            return [*self._offers(self.open_round, (device_id,), now), *again]
        return again

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
        if self.masks is None or self.task_of(update) is None:
            return ""
        if self.masks.phase != UPDATES:
            return "its round takes no masked updates now"
        return "" if self.masks.takes_part(update.device_id) else "it is not of those who mask together"

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

    def declined(self, device_id: str, task_id: str, cause: str) -> None:
        """A device cannot do its task, durably noted: it is asked for something else, or the round goes on without it."""
        task, open_round = self.owed(device_id, task_id), self.open_round
        if open_round and task:
            self._learn(Outcome(device_id, task.work, {}, cause, task.round))
            self._budget.take(device_id, -1)
            self._put_aside(open_round, task)

    def advance(self, now: float) -> list[Action]:
        """Do what the events so far call for."""
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
            ConfigError: no device here can do any of the work that there is.
        """
        if self._is_deserted:
            raise ConfigError(self._desertion())
        late = self.open_round if self.open_round and self.open_round.deadline <= now else None
        return [*(self._end_of_time(late, now) if late else ()), *self.advance(now)]

    def due_at(self) -> float:
        """Time at which ``tick`` has something to do, if nothing happens before; inf for never."""
        if self._is_deserted:
            return -inf
        if self.open_round:
            return min(self.open_round.deadline, self.masks.due_at if self.masks else inf)
        number, least = self.closed + 1, self._settings.min_clients
        is_enough = not self._gathered and self.num_fit(number) >= least - self._num_excused(number, least)
        if self._budget_runs_out and not self.is_done:
            return self._began + self._patience.gather_s
        return self.since + self._gather_s if is_enough and not self.is_done else inf

    @property
    def _budget_runs_out(self) -> bool:
        """Whether fewer devices than a round needs may be asked again, as far as is known."""
        return bool(self._budget.num_spent) and self._budget.num_left < self._settings.min_clients

    def _mind_budget(self, now: float) -> None:
        """Ask those no more who have been asked as often as they may be; end the job if too few are left.

        At first others may be on their way, after a restart too: they are waited for as those of the first round are.
        """
        for device in [d for d in self.roster.present if self._budget.is_spent(d)]:
            self.roster.bar(device, _SPENT)
        if self._budget_runs_out and now >= self._began + self._patience.gather_s:
            most = self._settings.dp.most_epsilon
            self.early_end = (
                f"{self._budget.num_left} devices may be asked again, and a round needs {self._settings.min_clients}: "
                f"with another, epsilon would exceed {most:g}"
            )

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
            elif task.task_id in past.declined:
                self._put_aside(restored, task)
        self._begin_masks(restored, now)
        if self.masks:
            self.masks.ask(restored.tasks.values())
            for note in past.notes:
                self.masks.take(note, now)
            self._leave_out_slow(restored, self.masks)
        return restored

    def _begin_masks(self, open_round: OpenRound, now: float) -> None:
        settings, number = self._settings, open_round.number
        if settings.secure == MASKS:
            self.masks = MaskedRound(settings, self._patience, number=number, first=open_round.first, now=now)

    def _mask(self, open_round: OpenRound, now: float) -> list[Action]:
        """Go on with the masks of the open round; if too few can have any, begin it anew."""
        if self.masks is None:
            return []
        actions = self.masks.advance(open_round.of(Standing.PENDING), now)
        self._leave_out_slow(open_round, self.masks)
        return [*actions, *(self._repeat(open_round, now) if self._is_hopeless(open_round) else ())]

    def _leave_out_slow(self, open_round: OpenRound, masks: MaskedRound) -> None:
        if slow := [device for device in open_round.of(Standing.PENDING) if masks.lost(device)]:
            log.warning("round %d: goes on without %s", open_round.number, listed(slow))
        for device in slow:
            open_round.stand(device, Standing.REFUSED)

    def _is_hopeless(self, open_round: OpenRound) -> bool:
        masks, wanted = self.masks, self._settings.min_clients
        left = open_round.count(Standing.PENDING) + open_round.count(Standing.ACCEPTED)
        return masks is not None and masks.phase in (SHARES, UPDATES) and left < wanted

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
        why = "too few devices are left to take the masks off"
        if unfit := self.masks.unfit() if self.masks else []:
            why = f"the shares of {listed(unfit)} do not fit their keys"
        log.warning("round %d: %s; it begins anew", number, why)
        self.open_round = OpenRound(number, self._deadline(now), first=open_round.num_asked)
        self.roster.release()
        self._begin_masks(self.open_round, now)
        return [Repeat(number, self.open_round.first), *self._ask(self.open_round, now)]

    def _put_aside(self, open_round: OpenRound, task: Task) -> None:
        """Go on without a task that was declined; its device may be asked for another, or for nothing any more."""
        device = task.device_id
        open_round.stand(device, Standing.REFUSED)
        choice = self._choice(open_round.number, open_round.num_asked, device)
        if choice.work is None:
            self._bar(device, choice.reason)
        elif choice.work.policy != task.work.policy:
            open_round.again.add(device)
            if device in self.roster:
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

    def _left_out(self, number: int) -> set[str]:
        """Devices here that are not to be asked in a round."""
        held = filter(partial(self.quarantine.holds, number=number), self.quarantine.until(number))
        return {device for device in held if device in self.roster}

    def _num_excused(self, number: int, wanted: int, *, with_refused: bool = False) -> int:
        """How many of the devices that a round wants it goes without, as they are here and not fit: always fewer than half.

        Nobody is excused as long as there are enough others, and nobody under masks: a sum of fewer hides less.
        """
        if self._settings.secure == MASKS:
            return 0
        unfit = self._left_out(number)
        if with_refused:
            unfit |= {
                d for d in self.quarantine.refused(number) if d in self.roster and not self._has_accepted(d)
            }
        lacking = max(0, wanted - (len(self.roster) - len(unfit)))
        return min(len(unfit), lacking, (wanted - 1) // 2)

    def _has_accepted(self, device_id: str) -> bool:
        return bool(self.open_round and self.open_round.standing(device_id) is Standing.ACCEPTED)

    def _deadline(self, now: float) -> float:
        return now + (self._patience.deadline_s or inf)

    def _open(self, now: float) -> list[Action]:
        if self.num_fit(self.closed + 1) < self.wanted(now):
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
        return [] if enough or open_round.count(Standing.PENDING) else self._ask(open_round, now)

    def _ask(self, open_round: OpenRound, now: float) -> list[Action]:
        """Ask as many as are lacking of those here who were not asked in this round; for the head all of them."""
        lacking = self._settings.clients - open_round.count(Standing.ACCEPTED)
        if self._is_of_head(open_round):
            lacking = len(self.roster)
        elif self.masks:
            lacking -= open_round.count(Standing.PENDING)
        draw = seeded(self._settings.seed, round_number=open_round.number, asked=open_round.num_asked)
        tasks: list[Task] = []
        is_left_out = partial(self.quarantine.holds, number=open_round.number)
        for device in self.roster.take(max(lacking, 0), draw, is_left_out=is_left_out):
            position = open_round.num_asked + len(tasks)
            choice = self._choice(open_round.number, position, device)
            if choice.work is None:
                self._bar(device, choice.reason)
            else:
                tasks.append(self._task(open_round, position, device, choice.work, choice.reason))
        if not tasks:
            return []
        tasks = self._packed(open_round, tasks)
        open_round.add(tasks)
        for task in tasks:
            self._budget.take(task.device_id)
        if self.masks:
            self.masks.ask(tasks)
        return [Enrol(tuple(tasks)), *self._offers(open_round, [task.device_id for task in tasks], now)]

    def _choice(self, number: int, position: int, device: str) -> Choice:
        if number <= self._settings.head_rounds:
            work = device_work(self._settings, round_number=number, position=position)
            return Choice(self._configurator.prepare(self._learned, work))
        return self._configurator.choose(self._learned, Candidate(device, number, position))

    def _packed(self, open_round: OpenRound, tasks: list[Task]) -> list[Task]:
        """Tasks of devices that are asked at once, with how their transfers are packed."""
        if self._is_of_head(open_round):
            return tasks
        return laid_over(self._traffic, self._carried, tasks, deadline_s=self._patience.deadline_s)

    def _task(self, open_round: OpenRound, position: int, device: str, work: LocalWork, reason: str) -> Task:
        number = open_round.number
        identity = default_task_id("train", number, device)
        return Task(
            task_id=f"{identity}-{position}" if open_round.first or device in open_round.tasks else identity,
            device_id=device,
            role="train",
            round=number,
            version=self.version,
            position=position,
            work=work,
            reason=one_line(reason, length_max=WHY_CHARS_MAX),
        )

    def _learn(self, outcome: Outcome) -> None:
        self._seen.add(outcome.device_id)
        self._learned = self._configurator.taught(self._learned, outcome)
        self._carried = self._traffic.learn(self._carried, outcome)

    def _is_of_head(self, open_round: OpenRound) -> bool:
        return open_round.number <= self._settings.head_rounds

    def _offers(self, open_round: OpenRound, devices: Iterable[str], now: float) -> list[Assign]:
        left_s = max(open_round.deadline - now, 0.0) if self._patience.deadline_s else 0.0
        return [Assign(open_round.tasks[device], left_s) for device in devices]

    def _close_if_complete(self, open_round: OpenRound, now: float) -> list[Action]:
        least = self._settings.min_clients
        least -= self._num_excused(open_round.number, least)
        is_enough = open_round.count(Standing.ACCEPTED) >= least
        is_late = self.masks is not None and self.masks.phase == REVEALS
        is_complete = is_enough and (is_late or not open_round.count(Standing.PENDING))
        return self._close(open_round, now) if is_complete else []

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
        num_accepted, least = open_round.count(Standing.ACCEPTED), self._settings.min_clients
        wanted = least - self._num_excused(open_round.number, least, with_refused=True)
        late = open_round.of(Standing.PENDING)
        is_unmasking = self.masks and self.masks.phase == REVEALS
        if num_accepted >= wanted and not is_unmasking:
            log.warning("round %d closes at its deadline without %s", open_round.number, listed(late))
            return self._close(open_round, now)
        if self.masks and not self.masks.is_taking_devices:
            return self._repeat(open_round, now)
        have = f"round {open_round.number}: {num_accepted} of at least {wanted} updates at its deadline"
        if open_round.extensions >= self._patience.extensions_max:
            raise TransportError(
                f"{have}, after {open_round.extensions} extensions; the same command resumes the job"
            )
        open_round.extensions += 1
        open_round.deadline = self._deadline(now)
        log.warning("%s: extended by %g s", have, self._patience.deadline_s)
        return [*self._offers(open_round, late, now), *self._ask(open_round, now)]
