"""What a device has done and sent in 24 hours: durable, and not to be fooled by a clock that jumps.

Within a process time passes on the monotonic clock. Between two processes it is the wall clock's difference: nothing where that
goes back, or where either time lies before 2024, as on a board without a clock of its own.
"""

from datetime import datetime, timezone
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from fleetune.device_runtime.prepared import prepared

DAY_S = 86_400.0
_CLOCK_SET_S = datetime(2024, 1, 1, tzinfo=timezone.utc).timestamp()
_FACT = "contract/day"
_Amount = Annotated[int, Meta(ge=0)]


class Facts(Protocol):
    """Small facts that are kept for good; an outbox is one."""

    def remember(self, key: str, value: bytes) -> None:
        """Keep a fact."""

    def recall(self, key: str) -> bytes | None:
        """Return a fact, or None."""


class Spent(msgspec.Struct, frozen=True):
    """Of the day that is running."""

    rounds: _Amount = 0
    sent_bytes: _Amount = 0
    elapsed_s: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    """Since the day began."""
    wall_s: float = 0.0
    """Wall clock when this was kept."""
    key: str = ""
    """Of the offer counted last: it counts once, however often its work is taken up again."""


class Day:
    """The amounts of one device. A day begins with the first look after the one before is over."""

    def __init__(self, facts: Facts, *, wall_s: float) -> None:
        """Take up what was kept; damaged counts begin a day that is full of nothing, StateError if they cannot be read."""
        self._facts = facts
        found = _decoded(facts.recall(_FACT))
        self._spent = msgspec.structs.replace(
            found, elapsed_s=found.elapsed_s + _between(found.wall_s, wall_s)
        )
        self._looked_at: float | None = None

    def spent(self, now: float) -> Spent:
        """What counts at ``now``, seconds of a monotonic clock."""
        passed = 0.0 if self._looked_at is None else max(0.0, now - self._looked_at)
        self._looked_at = now
        elapsed_s = self._spent.elapsed_s + passed
        if elapsed_s >= DAY_S:
            self._spent = Spent(key=self._spent.key)
        else:
            self._spent = msgspec.structs.replace(self._spent, elapsed_s=elapsed_s)
        return self._spent

    def add(self, now: float, *, wall_s: float, sent_bytes: int = 0, key: str = "") -> None:
        """Count bytes, or an offer by its ``key``, and keep the counts. StateError if they cannot be written."""
        spent = self.spent(now)
        is_new = bool(key) and key != spent.key
        self._spent = Spent(
            spent.rounds + is_new, spent.sent_bytes + sent_bytes, spent.elapsed_s, wall_s, key or spent.key
        )
        self._facts.remember(_FACT, msgspec.json.encode(self._spent))


def _decoded(kept: bytes | None) -> Spent:
    try:
        return msgspec.json.decode(kept, type=prepared(Spent)) if kept else Spent()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Spent()


def _between(before_s: float, after_s: float) -> float:
    return max(0.0, after_s - before_s) if min(before_s, after_s) >= _CLOCK_SET_S else 0.0
