"""Uploads being pulled from devices: a bounded number at once, the others wait their turn."""

from collections.abc import Iterator
from typing import NamedTuple

from fleetune.device_runtime.contracts.transfer import Incoming, Pull
from fleetune.device_runtime.contracts.wire import Chunk, Request, UpdateReady

IDLE_S = 60.0
"""A pull without progress for so long makes room for one that waits."""


class Upload(NamedTuple):
    """An announced update whose payload is on its way."""

    update: UpdateReady
    pull: Pull


class Pulls:
    """At most ``limit`` uploads at once, one a device; memory is ``limit`` times ``size_bytes_max``."""

    def __init__(self, *, size_bytes_max: int, limit: int = 8) -> None:
        self._size_bytes_max = size_bytes_max
        self._limit = limit
        self._active: dict[str, Upload] = {}
        self._waiting: dict[str, UpdateReady] = {}

    def begin(self, update: UpdateReady, now: float) -> None:
        """Pull an update, or let it wait; a payload that is being pulled already goes on.

        Raises:
            WireError: oversized or inconsistent; nothing is allocated.
        """
        device, old = update.device_id, self._active.get(update.device_id)
        if old and old.update.payload == update.payload:
            self._active[device] = Upload(update, old.pull)
            return
        Incoming(update.payload, size_bytes_max=self._size_bytes_max)
        self._active.pop(device, None)
        self._waiting[device] = update
        self._fill(now)

    def add(self, device_id: str, chunk: Chunk, now: float) -> None:
        """Take a chunk; one that nobody waits for is ignored. WireError if it is damaged."""
        upload = self._active.get(device_id)
        if upload and upload.pull.sha256 == chunk.sha256:
            upload.pull.add(chunk, now)

    def finished(self, now: float) -> list[Upload]:
        """Return and forget the uploads that are complete; their content is still to be verified."""
        complete = [upload for upload in self._active.values() if upload.pull.done]
        for upload in complete:
            del self._active[upload.update.device_id]
        self._fill(now)
        return complete

    def due(self, now: float) -> Iterator[tuple[str, Request]]:
        """Yield the requests to send now, with their devices."""
        self._evict(now)
        for device, upload in self._active.items():
            if request := upload.pull.due(now):
                yield device, request

    def restart(self, device_id: str, now: float) -> None:
        """The device was away: what was on its way is lost."""
        if upload := self._active.get(device_id):
            upload.pull.restart(now)

    def drop_below(self, round_number: int) -> list[UpdateReady]:
        """Forget the uploads of earlier rounds, and return what was announced."""
        known = [*(u.update for u in self._active.values()), *self._waiting.values()]
        late = [update for update in known if update.round < round_number]
        for update in late:
            self._active.pop(update.device_id, None)
            self._waiting.pop(update.device_id, None)
        return late

    def _fill(self, now: float) -> None:
        while self._waiting and len(self._active) < self._limit:
            device = next(iter(self._waiting))
            update = self._waiting.pop(device)
            pull = Pull(update.payload, size_bytes_max=self._size_bytes_max, now=now)
            self._active[device] = Upload(update, pull)

    def _evict(self, now: float) -> None:
        stuck = [d for d, upload in self._active.items() if upload.pull.idle_s(now) >= IDLE_S]
        for device in stuck[: len(self._waiting)]:
            del self._active[device]
        self._fill(now)
