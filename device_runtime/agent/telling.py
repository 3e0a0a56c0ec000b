"""What a device tells of its work while somebody looks: what it is at, how fast, and how its machine does."""

from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple

from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.jitter import Jitter
from fleetune.device_runtime.contracts.fields import SECONDS_MAX
from fleetune.device_runtime.contracts.software import software

LEAST_S = 3.0
"""It is never told more often, whatever is asked for."""
_IDLE = 4
"""Who does not work tells so many times less often."""


class Progress(NamedTuple):
    """What a device is at."""

    phase: str = "idle"
    """One of ``wire.PHASES``."""
    round: int = 0
    step: int = 0
    """Steps done."""
    steps: int = 0
    """Of how many; 0 where that is not known."""
    step_s: float = 0.0
    deadline: float = inf
    """When its round closes, as far as it knows; inf for never."""


class Telling:
    """Says when a device tells of its progress, and what; nothing while nobody looks, or where its owner keeps it."""

    def __init__(self, home: Home, progress: Callable[[], Progress], said: Callable[[], str]) -> None:
        """Prepare; ``progress`` and ``said`` (what was refused or declined last) are asked when it is told."""
        self.due_at = inf
        """When it is next told; inf while nobody looks."""
        self._link, self._vitals = home.link, home.vitals
        self._progress, self._said = progress, said
        self._jitter = Jitter(home.identity.device_id)
        self._every_s, self._told_at = 0.0, -inf

    def looked_at(self, every_s: float, now: float) -> None:
        """The aggregator wants to be told about every so many seconds; not at all for 0."""
        wanted = max(every_s, LEAST_S) if every_s and self._vitals else 0.0
        if wanted == self._every_s:
            return
        self._every_s = wanted
        soonest = max(now, self._told_at + LEAST_S)
        self.due_at = soonest + self._jitter.within(wanted / 2) if wanted else inf

    def words(self, now: float) -> dict[str, Any]:
        """Fields of the status that say it; empty while nobody looks. The next time is put off."""
        if not self._every_s or self._vitals is None:
            return {}
        at, vitals = self._progress(), self._vitals()
        is_working = at.phase != "idle"
        self._told_at = now
        self.due_at = now + self._jitter.around(self._every_s * (1 if is_working else _IDLE))
        return {
            "phase": at.phase,
            "round": at.round,
            "step": at.step,
            "steps": at.steps,
            "step_s": min(at.step_s, SECONDS_MAX),
            "left_s": _left_s(at.deadline, now),
            "memory_mb": vitals.memory_mb,
            "temperature_c": vitals.temperature_c,
            "mb_sent": self._link.bytes_sent / 1e6,
            "mb_received": self._link.bytes_received / 1e6,
            "software": software(),
            "said": self._said(),
        }

    def begins(self, now: float) -> None:
        """It has got work: who has rested tells it as soon as who works would."""
        if self._every_s:
            soonest = max(now, self._told_at + LEAST_S)
            self.due_at = min(self.due_at, soonest + self._jitter.within(self._every_s / 4))


def _left_s(deadline: float, now: float) -> float:
    if deadline == inf:
        return 0.0
    left_s = min(max(deadline - now, -SECONDS_MAX), SECONDS_MAX)
    return left_s or -1e-3  # 0 says that there is no deadline
