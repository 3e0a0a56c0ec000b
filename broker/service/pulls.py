"""Uploads being pulled from devices: as many at once as memory and queues hold, the others wait their turn."""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import NamedTuple

from fleetune.broker.jobs.patience import UPLOADS_MB
from fleetune.broker.service.timers import Timers
from fleetune.device_runtime.contracts.pull import SLOWEST_BYTES_S, Pull
from fleetune.device_runtime.contracts.transfer import Incoming
from fleetune.device_runtime.contracts.wire import Chunk, Request, UpdateReady

FLYING_MAX = 400
"""Chunks on their way at once, of all uploads together: of 120 KiB each 49 MB, which the link's queue holds, and a fifth of the
messages that Mosquitto keeps for one client."""
WINDOW_MAX = 16
"""Chunks on their way at once of one upload; where many are pulled its share of ``FLYING_MAX``."""
IDLE_S = 60.0
"""A pull without progress for so long makes room for one that waits."""
LONGEST_S = 600.0
"""So long a pull may take while others wait, where the round has no deadline."""
_LAGS = 3
"""A request is answered in so many times as long as others were lately, or it is lost."""
_NEWEST = 0.1
"""What the newest counts for among times."""
_SOME, _MUCH = 3, 10
"""Of so many devices the pace has to be known for others to be measured by them; so many times slower one may be."""
_LOOK_S = 1.0
"""At most so often it is looked for one that should make room."""


class Upload(NamedTuple):
    """An announced update whose payload is on its way."""

    update: UpdateReady
    pull: Pull
    since: float
    """When it was asked for; what it stood aside is not counted."""
    until: float
    """When it has to be there."""

    @property
    def size_bytes(self) -> int:
        """As announced."""
        return self.update.payload.size_bytes


class _Waiting(NamedTuple):
    update: UpdateReady
    size_bytes_max: int
    until: float


class Pulls:
    """Uploads whose announced sizes are ``limit_bytes`` together, one at least, one a task.

    One whose device is gone stands aside at once, with what has come: it goes on from there when it is announced again, unless
    its memory was needed. While others wait so does one that stands still, and one that is too slow to be there in time.

    No message takes longer for more uploads, active or waiting.
    """

    def __init__(
        self,
        *,
        limit_bytes: float = UPLOADS_MB * 1e6,
        flying_max: int = FLYING_MAX,
        is_unread: Callable[[str], bool] = lambda device_id: False,
    ) -> None:
        """Begin with none; ``is_unread``: whether anything of a device has come that was not taken yet: chunks, perhaps."""
        self._limit_bytes, self._flying_max, self._is_unread = limit_bytes, flying_max, is_unread
        self._num_flying, self._lag_s = 0, 0.0
        """Chunks on their way; and how long it took lately from a request to its first chunk."""
        self._starved: dict[str, None] = {}
        """Uploads that ask for nothing as long as FLYING_MAX chunks are on their way, longest first."""
        self._active: dict[str, Upload] = {}
        self._waiting: dict[str, _Waiting] = {}
        self._aside: dict[str, Upload] = {}
        self._tasks: dict[str, dict[str, None]] = {}
        """Of devices with active uploads."""
        self._paces, self._slowest = dict[str, float](), 0.0
        """Seconds a byte of devices' last updates, and the most of all."""
        self._silent: dict[str, float] = {}
        """Devices found not to answer, and since when."""
        self._suspects: set[str] = set()
        """Those, until anything comes of them."""
        self._held_bytes = 0
        """Sizes of those active and aside."""
        self._timers = Timers(
            lambda task_id: min(self._active[task_id].pull.due_at, self._silent_at(task_id))
        )
        self._looks_at = self._gave_way_at = -inf
        """When one may have to make room next; when one that was too slow did: one in IDLE_S, as on a slow link all are."""

    def begin(self, update: UpdateReady, now: float, *, size_bytes_max: int, until: float = inf) -> None:
        """Pull an update, or let it wait; a payload that is being pulled already goes on. ``until``: when it has to be there.

        Who announces again long after it should have answered has lost the request: it is asked once more. What was said before
        the request came may arrive after it, on a slow link.

        Raises:
            WireError: oversized or inconsistent; nothing is allocated.
        """
        self._is_heard(update.device_id)
        task_id, old = update.task_id, self._active.get(update.task_id)
        if old and old.update.payload.sha256 == update.payload.sha256:
            pull, flying = old.pull, old.pull.num_flying
            if old.update.payload != update.payload:
                pull = pull.cut_anew(update.payload, size_bytes_max=size_bytes_max, now=now)
            elif pull.is_overdue(now) and self._has_lost(update.device_id, pull, now):
                pull.restart(now)
            self._num_flying += pull.num_flying - flying
            self._active[task_id] = old._replace(update=update, pull=pull)
            self._timers.look(task_id)
            return
        Incoming(update.payload, size_bytes_max=size_bytes_max)
        if old:
            self._leave(task_id)
        self._waiting[task_id] = _Waiting(update, size_bytes_max, until)
        self._fill(now)

    def add(self, device_id: str, chunk: Chunk, now: float) -> None:
        """Take a chunk; one that nobody waits for is ignored. WireError if it is damaged."""
        self._is_heard(device_id)
        for task_id in self._tasks.get(device_id, ()):
            pull = self._active[task_id].pull
            if pull.sha256 == chunk.sha256:
                self._timers.look(task_id)
                flying = pull.num_flying
                if pull.asked_at >= pull.progress_at:
                    self._lag_s += _NEWEST * (now - pull.asked_at - self._lag_s)
                try:
                    pull.add(chunk, now)
                finally:
                    self._num_flying += pull.num_flying - flying

    def finished(self, now: float) -> list[Upload]:
        """Return and forget the uploads that are complete; their content is still to be verified."""
        complete = [t for t in self._timers.looked_at if t in self._active and self._active[t].pull.done]
        found = [self._leave(task_id) for task_id in complete]
        self._learn(found)
        self._fill(now)
        return found

    def due(self, now: float) -> Iterator[tuple[str, Request]]:
        """Yield the requests to send now, with their devices."""
        self._evict(now)
        share = max(1, min(WINDOW_MAX, self._flying_max // max(1, len(self._active))))
        for task_id in self._next(now):
            update, pull, *_ = self._active[task_id]
            is_silent = now >= self._silent_at(task_id)
            if (is_silent or now >= pull.waits_until) and self._is_unread(update.device_id):
                self._timers.set(task_id, not_before=now + _LOOK_S)
                continue
            if is_silent:
                self._suspects.add(update.device_id)
                self._silent[update.device_id] = pull.progress_at
            flying = pull.num_flying
            pull.window_max = min(share, flying + self._flying_max - self._num_flying)
            if request := pull.due(now):
                yield update.device_id, request
            self._num_flying += pull.num_flying - flying
            self._timers.set(task_id)

    def _silent_at(self, task_id: str) -> float:
        """Time from which a device does not answer; inf if that was said of it.

        Of a link of which nothing is known it is taken for granted, once some are known, that it is not much slower than them.
        """
        update, pull, *_ = self._active[task_id]
        if update.device_id in self._suspects:
            return inf
        usual = _MUCH * self._slowest if len(self._paces) >= _SOME else 1 / SLOWEST_BYTES_S
        pace = self._paces.get(update.device_id, usual)
        return pull.silent_at(pace, least_s=_LAGS * self._lag_s)

    def _learn(self, whole: Sequence[Upload]) -> None:
        """Take the paces of uploads that are whole."""
        were_some = len(self._paces) >= _SOME
        for update, pull, *_ in whole:
            if pull.s_per_byte:
                self._paces[update.device_id] = pull.s_per_byte
                self._slowest = max(self._slowest, pull.s_per_byte)
        if not were_some and len(self._paces) >= _SOME:
            for task_id in self._active:
                self._timers.look(task_id)  # what was to be expected without any is long

    def _is_heard(self, device_id: str) -> None:
        """Something came: who was taken to be silent is slow, until its next update is whole."""
        if device_id in self._suspects:
            self._suspects.discard(device_id)
            self._paces[device_id] = max(self._paces.get(device_id, 0.0), 1 / SLOWEST_BYTES_S)

    def take_silent(self) -> dict[str, float]:
        """Give and forget the devices found not to answer, and since when: what was asked of them should have come."""
        found, self._silent = self._silent, {}
        return found

    def _next(self, now: float) -> Iterator[str]:
        """Yield the uploads to look at, as long as anything may be asked for; the others first when it may be again."""
        self._starved.update(dict.fromkeys(self._timers.take(now)))
        while self._starved and self._num_flying < self._flying_max:
            task_id = next(iter(self._starved))
            del self._starved[task_id]
            yield task_id

    def due_at(self) -> float:
        """Time at which ``due`` has something to yield, if no chunk comes before; inf for never."""
        return min(self._timers.due_at(), self._looks_at if self._waiting else inf)

    def restart(self, device_id: str, now: float) -> None:
        """The device was away, or empty: this side was: what was on its way is lost.

        A device says the same when it has heard nothing for long. What it was asked for just before is then still on its way
        there: where requests take long, that counts for longer.
        """
        for task_id in self._tasks.get(device_id, ()) if device_id else self._active:
            pull = self._active[task_id].pull
            if device_id and not self._has_lost(device_id, pull, now):
                continue
            self._num_flying -= pull.num_flying
            pull.restart(now)
            self._timers.look(task_id)

    def share_of(self, device_id: str) -> float | None:
        """Share of what a device sends that is here, of the update begun last; None if nothing of it is pulled."""
        tasks = self._tasks.get(device_id)
        known = (
            [t for t, upload in self._aside.items() if upload.update.device_id == device_id]
            if self._aside
            else []
        )
        if not (names := [*known, *(tasks or ())]):
            return None
        found = self._active.get(names[-1]) or self._aside[names[-1]]
        return found.pull.share

    def gone(self, device_id: str, now: float) -> None:
        """The device is gone: what it sends makes room until it announces it again."""
        self._suspects.discard(device_id)
        for task_id in [*self._tasks.get(device_id, ())]:
            self._stand_aside(task_id)
        for task_id in [t for t, w in self._waiting.items() if w.update.device_id == device_id]:
            del self._waiting[task_id]
        self._fill(now)

    def drop(self, is_wanted: Callable[[UpdateReady], bool]) -> list[UpdateReady]:
        """Forget the uploads that are not wanted any more, and return what was announced."""
        known = [*(u.update for u in self._active.values()), *(w.update for w in self._waiting.values())]
        late = [update for update in known if not is_wanted(update)]
        for update in late:
            self._waiting.pop(update.task_id, None)
            if update.task_id in self._active:
                self._leave(update.task_id)
        for task_id in [t for t, upload in self._aside.items() if not is_wanted(upload.update)]:
            self._held_bytes -= self._aside.pop(task_id).size_bytes
        return late

    def _has_lost(self, device_id: str, pull: Pull, now: float) -> bool:
        """Whether what was asked of a device would have been read by now, as requests go."""
        return now >= pull.asked_at + _LAGS * self._lag_s and not self._is_unread(device_id)

    def _fill(self, now: float) -> None:
        while self._waiting and self._has_room(next(iter(self._waiting.values())).update):
            task_id = next(iter(self._waiting))
            update, size_bytes_max, until = self._waiting.pop(task_id)
            pull, since = self._gone_on_with(update, size_bytes_max, now)
            until = now + LONGEST_S if until == inf else until
            self._active[task_id] = Upload(update, pull, since, until)
            self._tasks.setdefault(update.device_id, {})[task_id] = None
            self._held_bytes += update.payload.size_bytes
            self._timers.look(task_id)

    def _has_room(self, update: UpdateReady) -> bool:
        """Whether one more can be pulled; what stands aside longest goes for it, its own last."""
        if len(self._active) >= self._flying_max:
            return False
        own = self._aside.pop(update.task_id, None)
        needed = update.payload.size_bytes - (own.size_bytes if own else 0)
        while self._aside and self._held_bytes + needed > self._limit_bytes:
            self._held_bytes -= self._aside.pop(next(iter(self._aside))).size_bytes
        if own:
            self._aside[update.task_id] = own
        return not self._active or self._held_bytes + needed <= self._limit_bytes

    def _gone_on_with(self, update: UpdateReady, size_bytes_max: int, now: float) -> tuple[Pull, float]:
        """A pull of an update, from what has come of it before, and when it began."""
        if not (old := self._aside.pop(update.task_id, None)):
            return Pull(update.payload, size_bytes_max=size_bytes_max, now=now), now
        self._held_bytes -= old.size_bytes
        pull = old.pull.cut_anew(update.payload, size_bytes_max=size_bytes_max, now=now)
        return pull, now - (old.pull.progress_at - old.since)

    def _leave(self, task_id: str) -> Upload:
        upload = self._active.pop(task_id)
        self._timers.drop(task_id)
        self._starved.pop(task_id, None)
        self._num_flying -= upload.pull.num_flying
        self._held_bytes -= upload.size_bytes
        tasks = self._tasks[upload.update.device_id]
        del tasks[task_id]
        if not tasks:
            del self._tasks[upload.update.device_id]
        return upload

    def _stand_aside(self, task_id: str) -> None:
        upload = self._leave(task_id)
        if upload.pull.share:
            self._aside[task_id] = upload
            self._held_bytes += upload.size_bytes

    def _evict(self, now: float) -> None:
        if not self._waiting or now < self._looks_at:
            return
        stuck = [t for t, upload in self._active.items() if upload.pull.progress_at + IDLE_S <= now]
        slow = {} if stuck or now < self._gave_way_at + IDLE_S else self._slow()
        if slow:
            stuck, self._gave_way_at = [min(slow, key=lambda task_id: slow[task_id])], now
        for task_id in stuck[: len(self._waiting)]:
            self._stand_aside(task_id)
        self._fill(now)
        self._looks_at = max(now + _LOOK_S, self._evicts_at())

    def _evicts_at(self) -> float:
        """Time before which none will have to make room."""
        idle_at = min((u.pull.progress_at for u in self._active.values()), default=-inf) + IDLE_S
        slow_at = min((max(u.since, self._gave_way_at) for u in self._active.values()), default=-inf) + IDLE_S
        return min(idle_at, slow_at)

    def _slow(self) -> dict[str, float]:
        """Uploads that will not be there in time at the pace that they had for IDLE_S or longer: share of all in a second."""
        paces = {t: _pace(upload) for t, upload in self._active.items()}
        return {t: p for t, p in paces.items() if p * (self._active[t].until - self._active[t].since) < 1}


def _pace(upload: Upload) -> float:
    lasted = upload.pull.progress_at - upload.since
    return upload.pull.share / lasted if lasted >= IDLE_S else inf
