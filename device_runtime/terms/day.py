"""What a device has done and sent in 24 hours: durable, and not to be fooled by a clock that jumps.

Time passes on the monotonic clock, within a process and between two of one boot. Over a boot it is the wall clock's difference:
nothing where that goes back, or where either time lies before 2024, as on a board without a clock of its own.
"""

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from fleetune.device_runtime.prepared import prepared

DAY_S = 86_400.0
_CLOCK_SET_S = datetime(2024, 1, 1, tzinfo=timezone.utc).timestamp()
_FACT = "contract/day"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
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
    boot: str = ""
    """Of the system when this was kept; empty where that is not known."""
    boot_s: float = 0.0
    """Monotonic clock when this was kept, comparable in the same boot alone."""


class Day:
    """The amounts of one device. A day begins with the first look after the one before is over."""

    def __init__(self, facts: Facts, *, wall_s: float, boot: str = "", boot_s: float = 0.0) -> None:
        """Take up what was kept; damaged counts begin a day that is full of nothing, StateError if they cannot be read.

        Args:
            facts: where it was kept.
            wall_s: seconds since 1970, as the system believes.
            boot: of which boot the monotonic clock is; empty where that is not known, and the wall clock counts.
            boot_s: the monotonic clock.
        """
        self._facts, self._boot = facts, boot
        found = _decoded(facts.recall(_FACT))
        if boot and boot == found.boot:
            passed = max(0.0, boot_s - found.boot_s)
        else:
            passed = _between(found.wall_s, wall_s)
        self._spent = msgspec.structs.replace(found, elapsed_s=found.elapsed_s + passed)
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
            spent.rounds + is_new,
            spent.sent_bytes + sent_bytes,
            spent.elapsed_s,
            wall_s,
            key or spent.key,
            self._boot,
            now,
        )
        self._facts.remember(_FACT, msgspec.json.encode(self._spent))


def boot_id() -> str:
    """Return which boot of the system this is; empty where it does not say."""
    try:
        return _BOOT_ID.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _decoded(kept: bytes | None) -> Spent:
    try:
        return msgspec.json.decode(kept, type=prepared(Spent)) if kept else Spent()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Spent()


def _between(before_s: float, after_s: float) -> float:
    return max(0.0, after_s - before_s) if min(before_s, after_s) >= _CLOCK_SET_S else 0.0
