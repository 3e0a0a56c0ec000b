"""Who looks at the job, and what they are told: nothing is measured, said or asked for while nobody does."""

from collections import deque
from collections.abc import Collection
from itertools import islice
from math import inf, isfinite
from typing import Any

from fleetune.broker.rounds.federation import Federation
from fleetune.broker.rounds.open_round import OpenRound, Standing
from fleetune.broker.service.outbound import Outbound
from fleetune.broker.store.rows import Row
from fleetune.device_runtime.contracts.fields import (
    FIGURE_MAX,
    SECONDS_MAX,
    WATCHED_DEVICES_MAX,
    WATCHED_ROUNDS_MAX,
)
from fleetune.device_runtime.contracts.scores import SCORES
from fleetune.device_runtime.contracts.software import software
from fleetune.device_runtime.contracts.wire import LOOK_S, Look, RoundFigures, View, aggregator_topic
from fleetune.device_runtime.network.connection import Connection

TELL_S = 5.0
"""A device that is looked at says so often what it is at, in a small fleet."""
STATUSES_A_SECOND = 15
"""So many come together at most: what they cost the aggregator is then below one percent of a core (``bench watching``)."""
VIEW_S = 1.0
"""Between two views; all who look get the same."""
ROUNDS_KEPT = 4096
"""Rounds whose figures are at hand for who looks."""
_NAMED_OF = 1000
"""In rounds of more devices nobody is named that is waited for: to find them takes longer for more."""


class Watchers:
    """Of one service."""

    def __init__(
        self, link: Connection, federation: Federation, outbound: Outbound, *, here: Collection[str]
    ) -> None:
        """Prepare; ``here`` are the devices that have said hello and not gone since."""
        self.topic = aggregator_topic(federation.settings.job, "look")
        """Where they say that they look."""
        self._link, self._federation, self._outbound, self._here = link, federation, outbound, here
        self._figures: deque[RoundFigures] = deque(maxlen=ROUNDS_KEPT)
        self._until = -inf
        self._wanted: int | None = None
        self._view_due = -inf

    def keep(self, row: Row) -> None:
        """A round is complete."""
        self._figures.append(_figures(row))

    def look(self, message: Look, now: float) -> None:
        """Somebody looks."""
        self._until = now + LOOK_S
        wanted = message.rounds_from
        self._wanted = wanted if self._wanted is None else min(wanted, self._wanted)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Answer who waits for it, and let devices tell, or tell no more."""
        if self._wanted is not None and now >= self._view_due:
            self._view_due = now + VIEW_S
            self._outbound.show(self._view(self._wanted, now))
            self._wanted = None
        self._let_tell(tell_every_s(len(self._here)) if now < self._until else 0.0)

    def due_at(self) -> float:
        """Time at which :meth:`tick` has something to do; inf while nobody looks."""
        if self._wanted is not None:
            return self._view_due
        return self._until if self._outbound.tell_every_s else inf

    def _let_tell(self, every_s: float) -> None:
        if every_s != self._outbound.tell_every_s:
            self._outbound.tell_every_s = every_s
            self._outbound.announce()

    def _view(self, rounds_from: int, now: float) -> View:
        rounds, settings = self._federation.rounds, self._federation.settings
        left_out = rounds.quarantine.until(self._federation.round)
        return View(
            job=settings.job,
            session=self._outbound.session,
            software=software(),
            round=self._federation.round,
            num_rounds=settings.rounds,
            version=self._federation.version,
            left_out=dict(islice(left_out.items(), WATCHED_DEVICES_MAX)),
            dropped=self._link.dropped,
            figures=[*islice((f for f in self._figures if f.round >= rounds_from), WATCHED_ROUNDS_MAX)],
            **_open(rounds.open_round, now),
        )


def tell_every_s(num_devices: int) -> float:
    """Seconds between two statuses of a device: the least that lets no more than STATUSES_A_SECOND come, doubled in steps.

    In steps, for it is told to all devices whenever it changes.
    """
    every_s = TELL_S
    while num_devices > every_s * STATUSES_A_SECOND:
        every_s *= 2
    return every_s


def _open(open_round: OpenRound | None, now: float) -> dict[str, Any]:
    if open_round is None:
        return {"is_open": False}
    left_s = open_round.deadline - now
    is_small = len(open_round.tasks) <= _NAMED_OF
    return {
        "is_open": True,
        "left_s": max(-SECONDS_MAX, left_s) if left_s < SECONDS_MAX else 0.0,
        "num_pending": open_round.count(Standing.PENDING),
        "num_accepted": open_round.count(Standing.ACCEPTED),
        "num_refused": open_round.count(Standing.REFUSED),
        "pending": [*open_round.of(Standing.PENDING)][:WATCHED_DEVICES_MAX] if is_small else [],
    }


def _figures(row: Row) -> RoundFigures:
    measured = {name: getattr(row, name) for name in ("loss", *SCORES, "train_loss", "epsilon")}
    return RoundFigures(
        round=row.round,
        devices=row.devices,
        seconds=row.seconds,
        mb_down=row.bytes_down / 1e6,
        mb_up=row.bytes_up / 1e6,
        measured={
            name: value
            for name, value in measured.items()
            if value is not None and isfinite(value) and abs(value) <= FIGURE_MAX
        },
    )
