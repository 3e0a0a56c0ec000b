"""Alarms under the pretended clock: what happens at a time without a message, such as a device that leaves."""

import heapq
from collections.abc import Callable
from math import inf

from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns

Call = Callable[[float], object]
"""Told the time."""


class Alarms:
    """A member of :class:`Turns` that nobody writes to; calls due at one time are made in the order in which they were set."""

    def __init__(self, server: Loopback, turns: Turns) -> None:
        """Prepare to take turns."""
        self._calls: list[tuple[float, int, Call]] = []
        self._count = 0
        self._turns, self._link = turns, server.connect(())

    def at(self, time_s: float, call: Call) -> None:
        """Have ``call`` made at ``time_s``; never for inf."""
        if time_s < inf:
            self._count += 1
            heapq.heappush(self._calls, (time_s, self._count, call))
            self._turns.join(self._link, self)  # it is asked again when it is due

    def poll(self, now: float) -> None:
        """Make the calls that are due."""
        while self._calls and self._calls[0][0] <= now:
            heapq.heappop(self._calls)[2](now)

    def due_at(self, now: float) -> float:
        """Time of the next call; inf for none."""
        return self._calls[0][0] if self._calls else inf
