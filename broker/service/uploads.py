"""Updates from their announcement to their verdict: judged, pulled, judged again, added to the next version, kept.

Where many come at once, several are kept with one commit: none has its verdict before it is on disk.
"""

from collections.abc import Callable, Sequence
from math import inf

from fleetune.broker.jobs.patience import UPLOADS_MB
from fleetune.broker.rounds.actions import Action
from fleetune.broker.rounds.federation import Federation, verdict_on
from fleetune.broker.service.freight import sizes_of_update
from fleetune.broker.service.meter import Meter
from fleetune.broker.service.outbound import Outbound
from fleetune.broker.service.pulls import Pulls, Upload
from fleetune.broker.service.slow_links import SlowLinks
from fleetune.broker.service.versions import Versions
from fleetune.broker.store.store import Arrival, ByKind, Store
from fleetune.broker.tasks import REFUSED, Noted, Task, mark
from fleetune.device_runtime.contracts.codecs import is_repeat
from fleetune.device_runtime.contracts.fields import SECONDS_MAX
from fleetune.device_runtime.contracts.wire import Chunk, UpdateReady
from fleetune.device_runtime.contracts.work import SUMMED
from fleetune.device_runtime.errors import OtherMemory, StateError, TransportError, WireError
from fleetune.device_runtime.network.complaints import Complaints, fault

OURS = (StateError, TransportError, OSError, MemoryError)
"""What no message brings about, but our own disk, server or machine: the service stops."""
GROUP_MAX, _GROUP_BYTES, _GROUP_S = 32, 16_000_000, 0.25
"""Updates that are kept together: at most so many, so many bytes, or none longer in memory while further messages wait."""


class Uploads:
    """Those of one job. ``act`` carries out what comes of them."""

    def __init__(
        self,
        federation: Federation,
        store: Store,
        versions: Versions,
        *,
        meter: Meter,
        outbound: Outbound,
        complaints: Complaints,
        act: Callable[[Sequence[Action], float], None],
        limit_bytes: float = UPLOADS_MB * 1e6,
    ) -> None:
        """Prepare; all parts are of the same job. ``limit_bytes`` as of :class:`Pulls`."""
        self._federation, self._store, self._versions = federation, store, versions
        self._meter, self._outbound, self._complaints, self._act = meter, outbound, complaints, act
        self._pulls = Pulls(limit_bytes=limit_bytes, is_unread=outbound.is_unread)
        self._slow_links, self._received_bytes = SlowLinks(), dict[str, int]()
        """What is said of links, and how many bytes of chunks came of each device since its last update was whole."""
        self._offered_again: set[str] = set()
        """Tasks whose updates came with another memory."""
        self._group: dict[str, Arrival] = {}
        """Updates by task that are added and not on disk yet, whose devices have no verdict."""
        self._group_bytes, self._group_until = 0, inf

    def due_at(self) -> float:
        """Time at which ``tick`` has something to do, if no chunk comes before; inf for never."""
        return min(self._pulls.due_at(), self._group_until)

    def announced(self, update: UpdateReady, now: float) -> None:
        """Take an announcement: begin to pull its payload, or answer."""
        self._versions.downlink.worked_from(update.device_id, update.version)
        task = self._judged(update, now)
        if task is None:
            return
        try:
            size_bytes_max, until = self._versions.update_bytes_max(task), self._federation.rounds.deadline
            self._pulls.begin(update, now, size_bytes_max=size_bytes_max, until=until)
        except WireError as exc:
            self._refuse_and_note(update, str(exc), now)

    def add(self, device_id: str, chunk: Chunk, now: float) -> None:
        """Take a chunk; one that nobody waits for is ignored. WireError if it is damaged."""
        self._pulls.add(device_id, chunk, now)
        self._received_bytes[device_id] = self._received_bytes.get(device_id, 0) + len(chunk.data)

    def restart(self, device_id: str, now: float) -> None:
        """Ask again for all of a device that was away, or empty: of all, as this side was: what was on its way is lost."""
        if (share := self._pulls.share_of(device_id)) is not None:
            self._slow_links.broke(device_id, share=share)
        self._pulls.restart(device_id, now)

    def gone(self, device_id: str, now: float) -> None:
        """A device is gone: others take the place of what it was sending, until it announces that again."""
        self._pulls.gone(device_id, now)

    def tick(self, now: float, *, has_more: bool = False) -> None:
        """Settle what has come whole, and ask for the chunks that are due.

        Args:
            now: the time.
            has_more: further messages wait, perhaps with more updates: those that are whole may be kept together with them.

        Raises:
            StateError: the store cannot be read or written.
        """
        for upload in self._pulls.finished(now):
            self._received(upload, now)
        is_full = len(self._group) >= GROUP_MAX or self._group_bytes >= _GROUP_BYTES
        if is_full or not has_more or now >= self._group_until:
            self.keep(now)
        for device_id, request in self._pulls.due(now):
            self._outbound.tell(device_id, request)
        for device_id, since in self._pulls.take_silent().items():
            self._act(self._federation.silent(device_id, since, now), now)

    def keep(self, now: float) -> None:
        """Have what was added on disk, and say so; before anything else is done that follows from it.

        Raises:
            StateError: the store cannot be written.
        """
        group, self._group, self._group_bytes, self._group_until = self._group, {}, 0, inf
        if not group:
            return
        with self._store.together():
            self._store.accept_all([*group.values()])
            self._meter.spend(now)
        for update, *_ in group.values():
            self._outbound.tell(update.device_id, verdict_on(update))

    def drop_late(self) -> None:
        """Refuse what comes for a round that is closed."""
        is_wanted = self._federation.rounds.task_of
        for late in self._pulls.drop(lambda update: is_wanted(update) is not None):
            self._outbound.tell(late.device_id, verdict_on(late, f"round {late.round} is closed"))
        counts, share_of = self._received_bytes, self._pulls.share_of
        self._received_bytes = {name: n for name, n in counts.items() if share_of(name) is not None}

    def _judged(self, update: UpdateReady, now: float) -> Task | None:
        """Return the task of an update whose payload has to be seen; any other is answered."""
        if update.task_id in self._group:
            self.keep(now)
        judged = self._federation.judge(update)
        if isinstance(judged, Task):
            return judged
        self._outbound.tell(update.device_id, judged)
        return None

    def _received(self, upload: Upload, now: float) -> None:
        update, pull, since, _ = upload
        self._slow_links.came(
            update.device_id,
            size_bytes=upload.size_bytes,
            received_bytes=self._received_bytes.pop(update.device_id, 0),
            seconds=now - since,
        )
        task = self._judged(update, now)
        if task is None:
            return
        try:
            content = pull.content()
            is_summed = task.work.codec in SUMMED
            self._meter.knows(
                pull.sha256, ByKind(values=len(content)) if is_summed else sizes_of_update(content)
            )
            self._versions.add(task, content, update.num_samples)
        except OtherMemory as exc:
            self._offer_again(update, str(exc), now)
            return
        except WireError as exc:
            self._refuse_and_note(update, str(exc), now)
            return
        except OURS:
            raise
        except Exception as exc:  # noqa: BLE001 (a fault of ours that a stranger found must not end the job of all)
            self._refuse(update, fault(exc), now)
            return
        size_down, skipped = self._versions.downlink.size_of(task), not is_summed and is_repeat(content)
        noted = noted_of(update, task, size_down, upload_s=now - since, skipped=skipped)
        self._group[update.task_id] = Arrival(update, content, noted)
        self._group_bytes += len(content)
        self._group_until = min(self._group_until, now + _GROUP_S)
        if actions := self._federation.accepted(update, now, noted):
            self._act(actions, now)

    def _offer_again(self, update: UpdateReady, reason: str, now: float) -> None:
        """Have a device make its update anew with the memory that there is; a second time it is refused."""
        if update.task_id in self._offered_again:
            self._refuse(update, reason, now)
            return
        self._offered_again.add(update.task_id)
        self._complaints.warn(
            update.device_id, now, "round %d: asking %s again: %s", update.round, update.device_id, reason
        )
        self._act(self._federation.again(update.device_id, now), now)

    def _refuse_and_note(self, update: UpdateReady, reason: str, now: float) -> None:
        """Refuse what is the device's own fault; its place in the round is known to be lost before the round goes on."""
        noted = mark(update.round, update.device_id, REFUSED, reason)
        if self._store.mark(noted):
            self._federation.marked([noted])
        self._refuse(update, reason, now)

    def _refuse(self, update: UpdateReady, reason: str, now: float) -> None:
        who = update.device_id
        self._complaints.warn(who, now, "round %d: update of %s refused: %s", update.round, who, reason)
        self._outbound.tell(update.device_id, verdict_on(update, reason))
        self._act(self._federation.refused(update, reason, now), now)


def noted_of(
    update: UpdateReady, task: Task, size_down: int, *, upload_s: float, skipped: bool = False
) -> Noted:
    """What is noted of an update: what a device tells of itself is held to what can be.

    Args:
        update: as announced.
        task: that it answers.
        size_down: bytes of what the device was offered to fetch for it; 0 if that is not known.
        upload_s: how long its payload took to come.
        skipped: whether that says that the last update counts again.
    """
    fetch_s = update.stats.get("fetch_seconds", 0.0)
    has_fetched = size_down > 0 and 0 < fetch_s <= SECONDS_MAX
    return Noted(
        bytes_down=size_down if has_fetched else 0,
        seconds_down=fetch_s if has_fetched else 0.0,
        bytes_up=update.payload.size_bytes,
        seconds_up=min(max(upload_s, 0.0), SECONDS_MAX),
        skipped=skipped,
        histogram=tuple(update.histogram) if task.work.histogram else (),
    )
