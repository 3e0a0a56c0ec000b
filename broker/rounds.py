"""A federation as a state machine: events in, each with its time, actions out; no socket, no clock, no disk.

Round r, from 1, starts from version r - 1 and closes into version r. Actions are to be carried out in order,
durably, before the next event: what they leave is what a restart gives back as :class:`Past`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from fleetune.broker.actions import Action, Ask, Close, Dismiss, Finish, Send
from fleetune.broker.evaluations import Evaluations
from fleetune.broker.job import Patience, Settings
from fleetune.device_runtime.contracts.wire import (
    REASON_CHARS_MAX,
    ROLES,
    Hello,
    Report,
    UpdateReady,
    Verdict,
    encode,
)
from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.errors import TransportError, WireError

log = logging.getLogger(__name__)


class Past(NamedTuple):
    """What a federation remembers across restarts."""

    version: int = 0
    asked: tuple[str, ...] = ()
    """Devices of the open round, in order; empty if none is open."""
    accepted: Mapping[tuple[int, str], str] = {}
    """Digest of the accepted update by round and device."""
    reported: frozenset[tuple[int, str]] = frozenset()
    """Evaluations at hand: (version, device)."""
    finished: bool = False


class Standing(Enum):
    """Where a device stands in the open round."""

    PENDING = "pending"
    ACCEPTED = "accepted"
    REFUSED = "refused"


@dataclass
class _Round:
    number: int
    deadline: float
    standing: dict[str, Standing] = field(default_factory=dict)
    refusals: dict[bytes, str] = field(default_factory=dict)
    extensions: int = 0

    def of(self, standing: Standing) -> tuple[str, ...]:
        return tuple(d for d, s in self.standing.items() if s is standing)


class Federation:
    """The rounds of one job. A method that takes ``now`` returns the actions that its event causes."""

    def __init__(
        self, settings: Settings, patience: Patience, *, now: float, past: Past | None = None
    ) -> None:
        past = past or Past()
        self.settings = settings
        self.version = past.version
        self.finished = past.finished
        self._patience = patience
        self._accepted = dict(past.accepted)
        self.evaluations = Evaluations(settings, past.reported)
        self._trainers: set[str] = set()
        self._paused: set[str] = set()
        self._progress = now
        self._gathered = False
        self._round = self._restored(past, now) if past.asked else None

    @property
    def round(self) -> int:
        """Number of the open round, or of the last one closed."""
        return self._round.number if self._round else self.version

    @property
    def present(self) -> tuple[str, ...]:
        """Devices here that train."""
        return tuple(sorted(self._trainers))

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
        if hello.role == "train":
            self._trainers.add(device)
            again = self._offers((device,), now) if self._is(device, Standing.PENDING) else []
        else:
            again = [*self.evaluations.hello(device, self.version)]
        return [*again, *self._advance(now)]

    def offline(self, device_id: str, now: float) -> list[Action]:
        """A device is gone; its place in the round stays until the deadline."""
        self._trainers.discard(device_id)
        self.evaluations.offline(device_id)
        return self._advance(now)

    def paused(self, device_id: str, *, is_paused: bool) -> None:
        """A device's own rules keep it from working, or no longer do: while they do, others are asked before it."""
        (self._paused.add if is_paused else self._paused.discard)(device_id)

    def judge(self, update: UpdateReady) -> Verdict | None:
        """Answer an announced update at once, or None if its payload has to be seen."""
        digest, key = update.payload.sha256, (update.round, update.device_id)
        if self._accepted.get(key) == digest:
            return verdict_on(update)
        reason = self._refusal(update)
        return verdict_on(update, reason) if reason else None

    def accepted(self, update: UpdateReady, now: float) -> list[Action]:
        """The payload of an update that ``judge`` passed is good, and durable."""
        self._accepted[update.round, update.device_id] = update.payload.sha256
        if self._round and self._round.number == update.round:
            self._round.standing[update.device_id] = Standing.ACCEPTED
        return self._advance(now)

    def refused(self, update: UpdateReady, reason: str, now: float) -> list[Action]:
        """The payload of an update that ``judge`` passed is bad: the round goes on without it."""
        if self._round and self._round.number == update.round:
            self._round.standing[update.device_id] = Standing.REFUSED
            self._round.refusals[_identity(update)] = reason[:REASON_CHARS_MAX]
        return self._advance(now)

    def declined(self, device_id: str, round_number: int, now: float) -> list[Action]:
        """A device cannot do what it was asked to do: the round goes on without it."""
        self.evaluations.declined(device_id, round_number)
        if self._round and self._round.number == round_number and self._is(device_id, Standing.PENDING):
            self._round.standing[device_id] = Standing.REFUSED
        return self._advance(now)

    def reported(self, report: Report, now: float) -> list[Action]:
        """A report that ``evaluations.judge`` passed is durable."""
        self._progress = now
        self.evaluations.reported(report)
        return self._advance(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed.

        Raises:
            TransportError: the round has been extended too often.
        """
        if self._round and self._round.deadline <= now:
            return [*self._end_of_time(self._round, now), *self._advance(now)]
        return self._advance(now)

    def _restored(self, past: Past, now: float) -> _Round:
        number = past.version + 1
        restored = _Round(number, self._deadline(now))
        for device in past.asked:
            done = (number, device) in past.accepted
            restored.standing[device] = Standing.ACCEPTED if done else Standing.PENDING
        return restored

    def _deadline(self, now: float) -> float:
        return now + (self._patience.deadline_s or np.inf)

    def _is(self, device: str, standing: Standing) -> bool:
        return bool(self._round) and self._round.standing.get(device) is standing  # type: ignore[union-attr]

    def _unfit(self, hello: Hello) -> str:
        if hello.artifact != self.settings.artifact:
            return f"its artifact is {hello.artifact[:12]}, this job's is {self.settings.artifact[:12]}"
        return "it has no samples" if hello.num_samples < 1 else ""

    def _refusal(self, update: UpdateReady) -> str:
        number, device = update.round, update.device_id
        if not 1 <= number <= self.round:
            return f"round {number} is unknown; the newest is {self.round}"
        if (number, device) in self._accepted:
            return f"another update of this device is accepted in round {number}"
        if not self._round or number != self._round.number:
            return f"round {number} is closed"
        if device not in self._round.standing:
            return f"device {device!r} was not asked in round {number}"
        if update.version != self.version:
            return f"it starts from version {update.version}; round {number} starts from {self.version}"
        if update.codec != self.settings.work.codec:
            return f"its codec is {update.codec!r}; {self.settings.work.codec!r} was asked for"
        return self._round.refusals.get(_identity(update), "")

    def _advance(self, now: float) -> list[Action]:
        actions: list[Action] = []
        if self._round:
            actions += self._ask_more(self._round, now)
            actions += self._close_if_complete(self._round, now)
        if not self._round and self.version < self.settings.rounds:
            actions += self._open(now)
        return [*actions, *self.evaluations.offers(self.version), *self._finish(now)]

    def _open(self, now: float) -> list[Action]:
        settings, here = self.settings, self.present
        waited = self._gathered or (
            self._patience.gather_s and now >= self._progress + self._patience.gather_s
        )
        if len(here) < (settings.min_clients if waited else settings.clients):
            return []
        self._gathered = True
        self._round = _Round(self.version + 1, self._deadline(now))
        return self._ask(self._round, self._choose(here, settings.clients), now)

    def _choose(self, devices: tuple[str, ...], limit: int) -> tuple[str, ...]:
        asked = len(self._round.standing) if self._round else 0
        key = Key(self.settings.seed, "selection", self.version + 1, asked)
        order = sorted(permutation(key, len(devices)).tolist(), key=lambda i: devices[i] in self._paused)
        return tuple(devices[i] for i in sorted(order[:limit]))

    def _ask(self, open_round: _Round, devices: tuple[str, ...], now: float) -> list[Action]:
        if not devices:
            return []
        open_round.standing.update(dict.fromkeys(devices, Standing.PENDING))
        return [Ask(open_round.number, devices), *self._offers(devices, now)]

    def _offers(self, devices: Iterable[str], now: float) -> list[Action]:
        assert self._round
        number, places = self._round.number, list(self._round.standing)
        left_s = max(self._round.deadline - now, 0.0) if self._patience.deadline_s else 0.0
        return [Send(d, "train", number, self.version, places.index(d), left_s) for d in devices]

    def _ask_more(self, open_round: _Round, now: float) -> list[Action]:
        enough = len(open_round.of(Standing.ACCEPTED)) >= self.settings.min_clients
        if enough or open_round.of(Standing.PENDING):
            return []
        return self._ask(open_round, self._spare(open_round), now)

    def _spare(self, open_round: _Round) -> tuple[str, ...]:
        wanted = self.settings.clients - len(open_round.of(Standing.ACCEPTED))
        return self._choose(tuple(d for d in self.present if d not in open_round.standing), wanted)

    def _close_if_complete(self, open_round: _Round, now: float) -> list[Action]:
        accepted = open_round.of(Standing.ACCEPTED)
        if open_round.of(Standing.PENDING) or len(accepted) < self.settings.min_clients:
            return []
        return self._close(open_round, now)

    def _close(self, open_round: _Round, now: float) -> list[Action]:
        self._round = None
        self.version = open_round.number
        self._progress = now
        return [Close(open_round.number, tuple(sorted(open_round.of(Standing.ACCEPTED))))]

    def _end_of_time(self, open_round: _Round, now: float) -> list[Action]:
        num_accepted, wanted = len(open_round.of(Standing.ACCEPTED)), self.settings.min_clients
        if num_accepted >= wanted:
            late = open_round.of(Standing.PENDING)
            log.warning("round %d closes at its deadline without %s", open_round.number, ", ".join(late))
            return self._close(open_round, now)
        have = f"round {open_round.number}: {num_accepted} of at least {wanted} updates at its deadline"
        if open_round.extensions >= self._patience.extensions_max:
            raise TransportError(
                f"{have}, after {open_round.extensions} extensions; the same command resumes the job"
            )
        open_round.extensions += 1
        open_round.deadline = self._deadline(now)
        log.warning("%s: extended by %g s", have, self._patience.deadline_s)
        again = self._offers(open_round.of(Standing.PENDING), now)
        return [*again, *self._ask(open_round, self._spare(open_round), now)]

    def _finish(self, now: float) -> list[Action]:
        if self.finished or self._round or self.version < self.settings.rounds:
            return []
        silent = self.evaluations.silent(self.version)
        limit_s = self._patience.evaluation_s or np.inf
        if silent and now < self._progress + limit_s:
            return []
        self.finished = True
        if silent:
            log.warning("finished without the last evaluation of %s", ", ".join(silent))
        here = tuple(sorted({*self._trainers, *self.evaluations.present}))
        return [Finish(f"{self.version} rounds are done", here)]


def verdict_on(update: UpdateReady, reason: str = "") -> Verdict:
    """The answer to an update: refused for ``reason``, or accepted without one."""
    return Verdict(
        job=update.job,
        round=update.round,
        digest=update.payload.sha256,
        accepted=not reason,
        reason=reason[:REASON_CHARS_MAX],
    )


def _identity(update: UpdateReady) -> bytes:
    """All of it: one damaged announcement must not condemn the good one that follows."""
    return sha256(encode(update)).digest()
