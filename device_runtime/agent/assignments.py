"""What a device was asked to do: the newest offer, the adapter it starts from, its run, and the verdict on what it gave."""

import logging
from dataclasses import dataclass
from math import inf

import msgspec

from fleetune.device_runtime.agent.codec_memory import CodecMemory
from fleetune.device_runtime.agent.deliveries import Deliveries
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.held_adapters import HeldAdapters, wanted_sha256
from fleetune.device_runtime.agent.held_mask import HeldMask
from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.jitter import Jitter
from fleetune.device_runtime.agent.listening import Listening
from fleetune.device_runtime.agent.local_run import LocalRun, Product
from fleetune.device_runtime.agent.made import Made
from fleetune.device_runtime.agent.masking import Masking
from fleetune.device_runtime.agent.offer_keys import key_of, key_of_0_1
from fleetune.device_runtime.agent.personal_layers import PersonalLayers
from fleetune.device_runtime.agent.telling import Progress
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.lora import frozen_names
from fleetune.device_runtime.contracts.mask_messages import MaskAsk, MaskGroup, MaskInbox
from fleetune.device_runtime.contracts.pull import STALL_S, Pull
from fleetune.device_runtime.contracts.secure_sums.grid import modulus_bits
from fleetune.device_runtime.contracts.wire import Chunk, Offer, UpdateReady, Verdict, encode, task_id_of
from fleetune.device_runtime.contracts.work import MASKED, SUMMED
from fleetune.device_runtime.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    DayIsSpent,
    FleetuneError,
    TooLittleMemory,
    WireError,
    one_line,
)
from fleetune.device_runtime.network.connection import send

log = logging.getLogger(__name__)

DEADLINE_GRACE_S = 5.0
"""A paused device gives a round up so long after its deadline: the aggregator may extend it then."""


@dataclass
class _Assignment:
    """An offer that was taken: first its adapter is pulled, if it is not at hand, then there is a run."""

    offer: Offer
    key: str
    deadline: float
    pull: Pull | None = None
    run: LocalRun | None = None
    since: float = 0.0
    """When it was taken."""


class Assignments:
    """One at a time: a newer offer takes the place of what the device is at."""

    def __init__(self, home: Home, workbench: Workbench, deliveries: Deliveries) -> None:
        """Prepare; ``deliveries`` are those of the same home."""
        self.version = -1
        """Of the adapter last worked from; -1 for none."""
        self.newest_round = -1
        """Of the offers taken in this session; -1 for none."""
        self.must_greet = False
        """Whether an offer came that only a hello can mend: it builds on an adapter that is not here."""
        self.said = ""
        """What was refused or declined last, and why; empty since something was taken."""
        self._home, self._workbench, self._deliveries = home, workbench, deliveries
        self._jitter = Jitter(home.identity.device_id)
        self._adapters = HeldAdapters(home.state, home.adapter)
        self._mask = HeldMask(home.files, home.adapter.arrays)
        device_id, job, artifact, *_ = home.identity
        self._memory = CodecMemory(home.files, job=job, artifact=artifact)
        self._personal = PersonalLayers(home.files, job=job, artifact=artifact, device_id=device_id)
        self.masking = Masking(home)
        """The masks of its update, where that is only ever summed."""
        self._made = Made(home.outbox, home.identity)
        self._memory.adopt(self._made.has_round, like=home.adapter.arrays)
        self.listening = Listening(home.link, home.identity.job)
        """To what is published once for all who want it."""
        self._current: _Assignment | None = None
        self._done: set[str] = set()
        self._asked_again: set[str] = set()

    @property
    def reference(self) -> str:
        """SHA-256 of the adapter file that the next one may be a difference from; empty for none."""
        return self._adapters.reference

    @property
    def original(self) -> str:
        """SHA-256 of the artifact's own adapter file, if it may be a difference from that too and ``reference`` is another."""
        return self._adapters.other_reference

    def held_mask(self) -> str:
        """SHA-256 of the mask that is here, read from its file; empty for none."""
        return self._mask.digest

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return self._current is None

    @property
    def is_fetching(self) -> bool:
        """Whether chunks of the adapter are missing."""
        return bool(self._current and self._current.pull)

    @property
    def waits_until(self) -> float:
        """Time from which only a message gives it work: while chunks come at their pace it waits for no other; inf in a run."""
        if self._current is None:
            return -inf
        return self._current.pull.expects_until if self._current.pull else inf

    @property
    def fetch_due_at(self) -> float:
        """Time from which :meth:`fetch` has something to do, if no chunk comes before; inf if nothing is fetched."""
        if self._current is None or self._current.pull is None:
            return inf
        return -inf if self._current.pull.done else self._current.pull.due_at

    @property
    def overdue_at(self) -> float:
        """Time at which the round of the assignment is over, as far as the device can know; inf for never."""
        return self._current.deadline + DEADLINE_GRACE_S if self._current else inf

    @property
    def has_step(self) -> bool:
        """Whether :meth:`step` has something to do."""
        return (
            self._current is not None and self._current.run is not None and not self._current.run.is_waiting
        )

    @property
    def progress(self) -> Progress:
        """What it is at."""
        if self._current is None:
            return Progress(round=max(self.newest_round, 0))
        offer, run = self._current.offer, self._current.run
        at = Progress("fetching", offer.round, deadline=self._current.deadline)
        return run.progress(at) if run else at

    def renew(self) -> None:
        """Another session of the aggregator may ask for what was done in an earlier one."""
        self.newest_round = -1
        self._done.clear()

    def take(self, offer: Offer, now: float) -> None:
        """Take an offer; one taken before only moves the deadline, or has what it gave announced again.

        Raises:
            WireError: it is for another role.
        """
        if not offer.task_id:
            offer = msgspec.structs.replace(offer, task_id=self._made.default_task_id(offer))
        key = key_of(offer)
        role = self._home.identity.role
        if offer.role != role:
            raise WireError(f"offer to {offer.role[:64]!r}; this device's role is {role!r}")
        if self._current and self._current.key == key:
            self._current.deadline = _deadline(offer, now)
            self._cut_anew(self._current, offer, now)
            return
        if key in self._done or offer.round < self.newest_round:
            return
        if self._deliveries.holds(offer.task_id):
            if self._made.came_of(offer, key):
                self._deliveries.rush()
                return
            self._deliveries.drop(offer.task_id)
        self._begin(_Assignment(offer, key, _deadline(offer, now), since=now), now)

    def add(self, chunk: Chunk, now: float) -> None:
        """Take a chunk of the adapter; one that nobody waits for is ignored. WireError if it is damaged."""
        pull = self._current.pull if self._current else None
        if pull and pull.sha256 == chunk.sha256:
            pull.add(chunk, now)

    def listen(self, *, is_quiet: bool) -> None:
        """Hear the parts of a stream that are on their way here, and no others; none where nothing may be fetched."""
        pull = self._current.pull if self._current else None
        if pull and (is_quiet or not self.listening.is_of_use):
            pull.join("")
        self.listening.to(pull.parts if pull else ())

    def restart(self, now: float) -> None:
        """The device was away: what was on its way is lost."""
        if self._current and self._current.pull:
            self._current.pull.restart(now)

    def fetch(self, now: float) -> bool:
        """Ask for the chunks that are due; True when the adapter is complete and there may be a step to do."""
        current = self._current
        if current is None or current.pull is None:
            return False
        if request := current.pull.due(now):
            if current.pull.is_deaf:
                self.listening.give_up()
            self.listening.to(current.pull.parts)  # first: what is asked for may come at once
            send(self._home.link, self._home.identity.up, encode(request))
        if not current.pull.done:
            return False
        try:
            sent = current.pull.content()
            payload = self._mask.parted(current.offer, sent)
            known = current.pull.sha256 if payload is sent else ""
            content = self._adapters.open(current.offer, payload, known=known)
        except WireError as exc:
            self.decline(exc)
            return False
        if content is None:
            self._current = None
            self._ask_again(current.key)
            return False
        self._start(current, content, fetch_s=now - current.since)
        return True

    def step(self) -> bool:
        """Do one step; True if there are more."""
        current = self._current
        if current is None or current.run is None:
            return False
        try:
            product = current.run.step()
        except (ConfigError, DataError, ArtifactError, WireError, DayIsSpent) as exc:
            self.decline(exc)
            return False
        if product:
            self._hand_over(product, current)
        return self.has_step

    def checkpoint(self) -> None:
        """Keep what is trained so far, if anything is."""
        if self._current and self._current.run:
            self._current.run.checkpoint()

    def decline(self, reason: FleetuneError | str) -> None:
        """Give the assignment up, so that nobody waits for it."""
        if self._current is None:
            return
        offer, identity = self._current.offer, self._home.identity
        number, said = offer.round, one_line(" ".join(str(reason).split()), length_max=REASON_CHARS_MAX)
        log.error("round %d: declined: %s", number, said)
        self.said = f"round {number}: declined: {said}"
        self._done.add(self._current.key)
        self._let_go()
        send(self._home.link, identity.up, identity.decline(offer, said, cause=_cause(reason)))
        self._home.on_event(Event("declined", number, text=said))

    def settle(self, verdict: Verdict) -> None:
        """Let go of what the verdict is about."""
        header = self._deliveries.settle(verdict)
        if header is None:
            return
        if key := self._made.key(task_id_of(header)):
            self._done.add(key)
            self._made.forget(task_id_of(header))
        if contract := self._home.contract:
            contract.settled(
                job=header.job,
                number=header.round,
                task_id=task_id_of(header),
                digest=verdict.digest,
                is_accepted=verdict.accepted,
            )
        if isinstance(header, UpdateReady):
            newest = max(self.newest_round, self._deliveries.newest_round)
            for kept in (self._memory, self._personal):
                kept.settle(verdict.round, accepted=verdict.accepted, newest=newest)
        self.said = "" if verdict.accepted else f"round {verdict.round}: refused: {verdict.reason}"
        if not verdict.accepted:
            log.warning("round %d: refused: %s", verdict.round, verdict.reason)
        kind = "accepted" if verdict.accepted else "refused"
        self._home.on_event(Event(kind, verdict.round, text=verdict.reason))

    def stop(self) -> None:
        """Drop the assignment: nobody wants it any more."""
        self._current = None
        self.masking.forget()

    def _begin(self, assignment: _Assignment, now: float) -> None:
        offer = assignment.offer
        lacks_mask = self._mask.lacks(offer)
        content = None if lacks_mask else self._adapters.find(wanted_sha256(offer))
        is_useless = self._adapters.lacks_reference(offer) or (lacks_mask and not offer.mask_bytes)
        if content is None and is_useless:
            self._ask_again(assignment.key)
            return
        if offer.round > self.newest_round:
            self._forget_older()  # they are refused by their round
        self.newest_round = offer.round
        if offer.task_id == self._made.default_task_id(offer):
            self._home.state.rename_checkpoint(lambda: key_of_0_1(offer), assignment.key)
        self._home.state.forget_checkpoints(but=assignment.key)
        self._current = assignment
        self._home.on_event(Event("offer", offer.round, {"version": offer.version}))
        if not self._is_allowed(assignment) or not self._can_be_summed(assignment):
            return
        if content is not None:
            self._start(assignment, content)
            return
        try:
            size_bytes_max = self._adapters.size_bytes_max(offer) + self._mask.size_bytes(offer)
            stall_s = self._jitter.around(STALL_S)
            assignment.pull = Pull(
                offer.adapter,
                size_bytes_max=size_bytes_max,
                now=now,
                stall_s=stall_s,
                stream=self.listening.stream_of(offer),
            )
        except (WireError, ConfigError) as exc:
            self.decline(exc)

    def _cut_anew(self, assignment: _Assignment, offer: Offer, now: float) -> None:
        """Go on fetching in chunks of another size, after a connection that broke: what is here stays."""
        old, pull = assignment.offer.adapter, assignment.pull
        if pull and offer.adapter != old and offer.adapter.sha256 == old.sha256:
            size_bytes_max = self._adapters.size_bytes_max(offer) + self._mask.size_bytes(offer)
            assignment.pull = pull = pull.cut_anew(offer.adapter, size_bytes_max=size_bytes_max, now=now)
            assignment.offer = offer
        if pull and offer.adapter == assignment.offer.adapter:
            pull.join(self.listening.stream_of(offer))

    def _is_allowed(self, assignment: _Assignment) -> bool:
        """Hold an offer to the owner's contract; what is outside is declined with the reason."""
        contract, offer, arrays = self._home.contract, assignment.offer, self._home.adapter.arrays
        if contract is None:
            return True
        try:
            contract.check(
                offer.work,
                role=offer.role,
                key=assignment.key,
                num_samples=self._workbench.num_samples,
                names=arrays.keys() - frozen_names(arrays, offer.work),
                data=self._workbench.data,
            )
        except (ConfigError, DayIsSpent) as exc:
            self.decline(exc)
            return False
        return True

    def _can_be_summed(self, assignment: _Assignment) -> bool:
        """Make the keys of an offer whose update is masked, while its adapter comes; without a grid it is declined."""
        offer = assignment.offer
        if offer.role != "train" or offer.work.codec not in SUMMED:
            return True
        try:
            modulus_bits(offer.grid)
            if offer.work.codec == MASKED:
                self.masking.begin(offer, assignment.key)
        except ConfigError as exc:
            self.decline(exc)
            return False
        return True

    def take_masks(self, message: MaskGroup | MaskInbox | MaskAsk) -> None:
        """Take what is said of masks; a group whose keys nobody vouches for has the offer declined. WireError as Masking's."""
        try:
            self.masking.take(message)
        except ConfigError as exc:
            self.decline(str(exc))  # it may be otherwise in the next round

    def _forget_older(self) -> None:
        self._done.clear()
        self._asked_again.clear()

    def _ask_again(self, key: str) -> None:
        """Say hello, once for an offer: it tells what is here, and the aggregator offers again."""
        self.must_greet = self.must_greet or key not in self._asked_again
        self._asked_again.add(key)

    def _start(self, assignment: _Assignment, content: bytes, *, fetch_s: float = 0.0) -> None:
        work = assignment.offer.work
        hiding = work if assignment.offer.role == "train" and work.hides_samples else None
        try:
            reference, mask = self._adapters.arrays(content), self._mask.of(assignment.offer)
            if self._home.contract:
                self._home.contract.begin(assignment.key, hiding=hiding, data=self._workbench.data)
        except (WireError, ConfigError) as exc:
            self.decline(exc)
            return
        if assignment.pull:
            self.listening.is_wide = assignment.pull.is_wide
        assignment.pull = None
        self.version = assignment.offer.version
        self._adapters.keep(content, wanted_sha256(assignment.offer))
        assignment.run = LocalRun(
            assignment.offer,
            reference,
            home=self._home,
            memory=self._memory,
            personal=self._personal,
            workbench=self._workbench,
            key=assignment.key,
            mask=mask,
            masking=self.masking,
            fetch_s=fetch_s,
        )

    def _hand_over(self, product: Product, assignment: _Assignment) -> None:
        header, payload, event, left = product
        if self._home.contract:
            self._home.contract.put_down(left, payload)
        made = self._made.facts(assignment.offer.task_id, assignment.key)
        self._deliveries.put(header, payload, facts=made)
        self._let_go()
        self._home.on_event(event)

    def _let_go(self) -> None:
        self._current = None
        self._home.state.forget_checkpoints()


def _cause(reason: FleetuneError | str) -> str:
    if isinstance(reason, TooLittleMemory):
        return "memory"
    return "work" if isinstance(reason, ConfigError) else ""


def _deadline(offer: Offer, now: float) -> float:
    return now + offer.deadline_s if offer.deadline_s > 0 else inf
