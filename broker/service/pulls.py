"""Uploads being pulled from devices: a bounded number at once, the others wait their turn."""

from collections.abc import Callable, Iterator
from math import inf
from typing import NamedTuple

from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.transfer import Incoming
from fleetune.device_runtime.contracts.wire import Chunk, Request, UpdateReady

IDLE_S = 60.0
"""A pull without progress for so long makes room for one that waits."""
LONGEST_S = 600.0
"""So long a pull may take while others wait, where the round has no deadline."""


class Upload(NamedTuple):
    """An announced update whose payload is on its way."""

    update: UpdateReady
    pull: Pull
    since: float
    """When it was asked for."""
    until: float
    """When it has to be there."""


class _Waiting(NamedTuple):
    update: UpdateReady
    size_bytes_max: int
    until: float


class Pulls:
    """At most ``limit`` uploads at once, one a task; memory is ``limit`` times the largest payload.

    While others wait, one that stands still gives way, and one that is too slow to be there in time.

    No message takes longer for more uploads that wait.
    """

    def __init__(self, *, limit: int = 8) -> None:
        self._limit = limit
        self._active: dict[str, Upload] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._gave_way_at = -inf
        """When one that was too slow made room: one in IDLE_S, for on a slow link all are, and each begins anew."""

    def begin(self, update: UpdateReady, now: float, *, size_bytes_max: int, until: float = inf) -> None:
        """Pull an update, or let it wait; a payload that is being pulled already goes on. ``until``: when it has to be there.

        Raises:
            WireError: oversized or inconsistent; nothing is allocated.
        """
        old = self._active.get(update.task_id)
        if old and old.update.payload == update.payload:
            self._active[update.task_id] = old._replace(update=update)
            return
        if old and old.update.payload.sha256 == update.payload.sha256:
            pull = old.pull.cut_anew(update.payload, size_bytes_max=size_bytes_max, now=now)
            self._active[update.task_id] = old._replace(update=update, pull=pull)
            return
        Incoming(update.payload, size_bytes_max=size_bytes_max)
        self._active.pop(update.task_id, None)
        self._waiting[update.task_id] = _Waiting(update, size_bytes_max, until)
        self._fill(now)

    def add(self, device_id: str, chunk: Chunk, now: float) -> None:
        """Take a chunk; one that nobody waits for is ignored. WireError if it is damaged."""
        for update, pull, *_ in self._active.values():
            if update.device_id == device_id and pull.sha256 == chunk.sha256:
                pull.add(chunk, now)

    def finished(self, now: float) -> list[Upload]:
        """Return and forget the uploads that are complete; their content is still to be verified."""
        complete = [upload for upload in self._active.values() if upload.pull.done]
        for upload in complete:
            del self._active[upload.update.task_id]
        self._fill(now)
        return complete

    def due(self, now: float) -> Iterator[tuple[str, Request]]:
        """Yield the requests to send now, with their devices."""
        self._evict(now)
        for update, pull, *_ in self._active.values():
            if request := pull.due(now):
                yield update.device_id, request

    def due_at(self) -> float:
        """Time at which ``due`` has something to yield, if no chunk comes before; inf for never."""
        stalls = min((upload.pull.due_at for upload in self._active.values()), default=inf)
        return min(stalls, self._evicts_at())

    def restart(self, device_id: str, now: float) -> None:
        """The device was away, or empty: this side was: what was on its way is lost."""
        for update, pull, *_ in self._active.values():
            if device_id in ("", update.device_id):
                pull.restart(now)

    def drop(self, is_wanted: Callable[[UpdateReady], bool]) -> list[UpdateReady]:
        """Forget the uploads that are not wanted any more, and return what was announced."""
        known = [*(u.update for u in self._active.values()), *(w.update for w in self._waiting.values())]
        late = [update for update in known if not is_wanted(update)]
        for update in late:
            self._active.pop(update.task_id, None)
            self._waiting.pop(update.task_id, None)
        return late

    def _fill(self, now: float) -> None:
        while self._waiting and len(self._active) < self._limit:
            task_id = next(iter(self._waiting))
            update, size_bytes_max, until = self._waiting.pop(task_id)
            pull = Pull(update.payload, size_bytes_max=size_bytes_max, now=now)
            self._active[task_id] = Upload(update, pull, now, now + LONGEST_S if until == inf else until)

    def _evicts_at(self) -> float:
        if not self._waiting:
            return inf
        idle_at = min((u.pull.progress_at for u in self._active.values()), default=-inf) + IDLE_S
        return min(idle_at, self._gave_way_at + IDLE_S if self._slow() else inf)

    def _evict(self, now: float) -> None:
        stuck = [t for t, upload in self._active.items() if upload.pull.progress_at + IDLE_S <= now]
        if not stuck and self._waiting and self._gave_way_at + IDLE_S <= now and (slow := self._slow()):
            stuck, self._gave_way_at = [min(slow, key=lambda task_id: slow[task_id])], now
        for task_id in stuck[: len(self._waiting)]:
            del self._active[task_id]
        self._fill(now)

    def _slow(self) -> dict[str, float]:
        """Uploads that will not be there in time at the pace that they had for IDLE_S or longer: share of all in a second."""
        paces = {t: _pace(upload) for t, upload in self._active.items()}
        return {t: p for t, p in paces.items() if p * (self._active[t].until - self._active[t].since) < 1}


def _pace(upload: Upload) -> float:
    lasted = upload.pull.progress_at - upload.since
    return upload.pull.share / lasted if lasted >= IDLE_S else inf
