"""Many members in one process, without threads, on a loopback: a turn for those who have a message or are due."""

import heapq
from collections.abc import Callable, Iterable
from math import inf
from typing import Protocol

from fleetune.device_runtime.network.loopback import Loopback, LoopbackLink

_HEAP_MIN = 64
"""A heap of so many entries is not worth looking through."""


class Member(Protocol):
    """An agent, or an aggregator."""

    def poll(self, now: float) -> object:
        """Take what has come and do what is due."""

    def due_at(self, now: float) -> float:
        """Time at which ``poll`` next has something to do without a message; inf for never."""


Order = Callable[[list[LoopbackLink]], Iterable[LoopbackLink]]


class Turns:
    """Turns under a pretended clock, which stands while anyone has something to do and jumps to the next time that anyone has.

    A turn costs what its members do, and a logarithm of all: those who wait for nothing near cost nothing.
    """

    def __init__(self, server: Loopback, *, now: float = 0.0, order: Order = list) -> None:
        """Prepare; ``order`` of those who have their turn at the same time, by default that of their news."""
        self.now = now
        self._server, self._order = server, order
        self._members: dict[LoopbackLink, Member] = {}
        self._due: dict[LoopbackLink, float] = {}
        self._heap: list[tuple[float, int, LoopbackLink]] = []
        self._pushed = 0
        self._ready: dict[LoopbackLink, None] = {}

    def join(self, link: LoopbackLink, member: Member) -> None:
        """Give a member, who reads ``link``, its turns from now on."""
        self._members[link] = member
        self._ready[link] = None

    def leave(self, link: LoopbackLink) -> None:
        """Give no more turns to whoever reads ``link``."""
        self._members.pop(link, None)
        self._due.pop(link, None)

    def turn(self) -> bool:
        """Poll once each who has something to do, after moving the clock if nobody has; False if nobody ever will."""
        self._gather()
        if not self._ready:
            if not self._heap:
                return False
            self.now = max(self.now, self._heap[0][0])
            self._gather()
        ready, self._ready = list(self._ready), {}
        for link in self._order(ready):
            if member := self._members.get(link):
                member.poll(self.now)
                self._schedule(link, member)
        return True

    def run(self, until: Callable[[], bool]) -> bool:
        """Give turns ``until`` it is true; False if before that nobody will ever have anything to do."""
        while not until():
            if not self.turn():
                return False
        return True

    def _gather(self) -> None:
        self._ready.update((link, None) for link in self._server.take_news() if self._has_to_do(link))
        while self._heap and (self._is_stale() or self._heap[0][0] <= self.now):
            due, _, link = heapq.heappop(self._heap)
            if self._due.get(link) == due:
                self._ready[link] = None
                del self._due[link]

    def _has_to_do(self, link: LoopbackLink) -> bool:
        member = self._members.get(link)
        return member is not None and (bool(link.inbox) or member.due_at(self.now) <= self.now)

    def _is_stale(self) -> bool:
        due, _, link = self._heap[0]
        return self._due.get(link) != due

    def _schedule(self, link: LoopbackLink, member: Member) -> None:
        due = -inf if link.inbox else member.due_at(self.now)
        if due <= self.now:
            self._due.pop(link, None)
            self._ready[link] = None
        elif due == inf:
            self._due.pop(link, None)
        elif self._due.get(link) != due:
            self._due[link] = due
            self._pushed += 1
            heapq.heappush(self._heap, (due, self._pushed, link))
            self._tidy()

    def _tidy(self) -> None:
        """Drop what is out of date, once that is most of the heap: it does not grow with the time that has passed."""
        if len(self._heap) > _HEAP_MIN + 4 * len(self._due):
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
