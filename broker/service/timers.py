"""Which of many things to look at: those that something happened to, and those whose time has come."""

import heapq
from collections.abc import Callable
from math import inf


class Timers:
    """Times of things; to look at one costs a logarithm of all.

    Args:
        time_of: when a thing is due, or later: it may be put off, never brought forward, without a word.
    """

    def __init__(self, time_of: Callable[[str], float]) -> None:
        self._time_of = time_of
        self._heap: list[tuple[float, str]] = []
        self._times: dict[str, float] = {}
        self._looked_at: dict[str, None] = {}

    @property
    def looked_at(self) -> list[str]:
        """What something happened to since it was taken."""
        return [*self._looked_at]

    def look(self, name: str) -> None:
        """Something happened to it: it is due at once."""
        self._looked_at[name] = None

    def set(self, name: str, *, not_before: float = -inf) -> None:
        """Have it taken when it is due, if it ever is, and not before a time."""
        if (due_at := max(self._time_of(name), not_before)) < self._times.get(name, inf):
            self._times[name] = due_at
            heapq.heappush(self._heap, (due_at, name))

    def drop(self, name: str) -> None:
        """Forget it."""
        self._looked_at.pop(name, None)
        self._times.pop(name, None)

    def take(self, now: float) -> list[str]:
        """Return what is due, and forget that it was."""
        while self._heap and self._heap[0][0] <= now and self.due_at(but_looked_at=True) <= now:
            _, name = heapq.heappop(self._heap)
            del self._times[name]
            self._looked_at[name] = None
        found, self._looked_at = [*self._looked_at], {}
        return found

    def due_at(self, *, but_looked_at: bool = False) -> float:
        """Time at which ``take`` has something; inf for never."""
        if self._looked_at and not but_looked_at:
            return -inf
        while self._heap:
            due_at, name = self._heap[0]
            if self._times.get(name) != due_at:
                heapq.heappop(self._heap)
            elif self._time_of(name) > due_at:
                heapq.heappop(self._heap)
                del self._times[name]
                self.set(name)
            else:
                return due_at
        return inf
