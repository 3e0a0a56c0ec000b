"""What a device owes the aggregator: announced until there is a verdict, served in chunks, kept in the outbox."""

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from math import inf

import msgspec

from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.jitter import Jitter
from fleetune.device_runtime.agent.outbox import Entry
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import (
    Chunk,
    Report,
    Request,
    TransferManifest,
    UpdateReady,
    Verdict,
    decode,
    encode,
    task_id_of,
)
from fleetune.device_runtime.errors import WireError, one_line
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.underway import Underway

log = logging.getLogger(__name__)

REPEAT_S = 5.0
REPEAT_MAX_S = 60.0
SERVED_S = 15.0
"""Whoever asked for chunks so recently needs no announcement."""


@dataclass
class _Parcel:
    entry: Entry
    header: UpdateReady | Report
    due: float = 0.0
    pause_s: float = REPEAT_S
    outgoing: Outgoing | None = None
    last: Hashable = None
    """What was sent of it last, as ``Underway`` knows it."""


class Deliveries:
    """The updates and reports of one device for one job; others' entries in the outbox are left alone."""

    def __init__(self, home: Home) -> None:
        self._link, self._outbox, self._topic = home.link, home.outbox, home.identity.up
        self._underway, self._jitter = Underway(home.link), Jitter(home.identity.device_id)
        self._contract = home.contract
        mine = [entry for entry in home.outbox.pending() if entry.job == home.identity.job]
        self._parcels = [parcel for entry in mine if (parcel := self._parcel(entry))]

    def __len__(self) -> int:
        return len(self._parcels)

    @property
    def newest_round(self) -> int:
        """The last round of which something waits for its verdict; -1 for none."""
        return max((parcel.header.round for parcel in self._parcels), default=-1)

    def holds(self, task_id: str) -> bool:
        """Whether something of this task waits for its verdict."""
        return any(task_id_of(p.header) == task_id for p in self._parcels)

    def put(
        self,
        header: Report | Callable[[TransferManifest], UpdateReady],
        payload: bytes = b"",
        *,
        facts: Mapping[str, bytes],
    ) -> None:
        """Keep on disk, together with ``facts``, to be announced next; the header of an update is made with its manifest."""
        if isinstance(header, Report):
            parcel = _Parcel(_entry(header, b""), header)
        else:
            outgoing = Outgoing(payload, chunk_bytes=self._link.chunk_bytes)
            update = header(outgoing.manifest)
            parcel = _Parcel(_entry(update, payload), update, outgoing=outgoing)
        self._outbox.put(parcel.entry, facts=facts)
        self._parcels.append(parcel)

    @property
    def due_at(self) -> float:
        """Time of the next announcement; inf if nothing is owed."""
        return min((parcel.due for parcel in self._parcels), default=inf)

    def announce(self, now: float) -> None:
        """Announce what is due, ever less often."""
        for parcel in self._parcels:
            if now >= parcel.due:
                parcel.due = now + self._jitter.around(parcel.pause_s)
                parcel.pause_s = min(2 * parcel.pause_s, REPEAT_MAX_S)
                self._say(parcel)

    def rush(self) -> None:
        """Announce everything at the next opportunity: the aggregator may know nothing of it."""
        for parcel in self._parcels:
            parcel.due, parcel.pause_s = 0.0, REPEAT_S

    def serve(self, request: Request, now: float) -> None:
        """Send the chunks asked for, but for those that are on their way to the server.

        Raises:
            WireError: a request for what is not here, or with a bitmap of another length; no more may be sent today.
        """
        parcel = next((p for p in self._parcels if p.entry.digest == request.sha256), None)
        if parcel is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not here")
        if self._contract and not self._contract.may_send():
            raise WireError("it asks for chunks, and this device's owner allows no more bytes today")
        outgoing = self._outgoing(parcel)
        if not outgoing.is_of(request):
            parcel.due, parcel.pause_s = 0.0, REPEAT_S  # it knows chunks of another size
            return
        parcel.due = now + SERVED_S
        for chunk in outgoing.chunks(request):
            self._send(parcel, chunk)

    def settle(self, verdict: Verdict) -> UpdateReady | Report | None:
        """Let go of what the verdict is about, and return its header; None if it is not here (any more)."""
        for parcel in self._parcels:
            if parcel.entry.digest == verdict.digest and _is_about(verdict, parcel.header):
                self._drop(parcel)
                return parcel.header
        return None

    def drop(self, task_id: str) -> None:
        """Let go of everything of a task."""
        for parcel in [p for p in self._parcels if task_id_of(p.header) == task_id]:
            self._drop(parcel)

    def _say(self, parcel: _Parcel) -> None:
        """Announce a parcel, unless its last word or chunk is still on its way to the server: who gets that needs no other."""
        said = encode(self._fresh_header(parcel))
        if not self._underway.has(parcel.last):
            parcel.last = said
            self._underway.once(said, lambda: send(self._link, self._topic, said))

    def _send(self, parcel: _Parcel, chunk: Chunk) -> None:
        key = parcel.last = (chunk.sha256, chunk.index, len(chunk.data))
        is_sent = self._underway.once(key, lambda: send(self._link, self._topic, encode(chunk)))
        if is_sent and self._contract:
            self._contract.sent(len(chunk.data))

    def _parcel(self, entry: Entry) -> _Parcel | None:
        """What an entry holds; a damaged one is dropped, so that its work is done again."""
        try:
            return _Parcel(entry, _header(entry))
        except WireError as exc:
            log.warning("outbox: what %s gave is dropped: %s", one_line(entry.task_id), exc)
            self._outbox.acknowledge(entry.job, entry.task_id, entry.digest)
            return None

    def _drop(self, parcel: _Parcel) -> None:
        self._outbox.acknowledge(parcel.entry.job, parcel.entry.task_id, parcel.entry.digest)
        self._parcels.remove(parcel)

    def _fresh_header(self, parcel: _Parcel) -> UpdateReady | Report:
        if isinstance(parcel.header, Report):
            return parcel.header
        return msgspec.structs.replace(parcel.header, payload=self._outgoing(parcel).manifest)

    def _outgoing(self, parcel: _Parcel) -> Outgoing:
        chunk_bytes = self._link.chunk_bytes
        if parcel.outgoing is None or parcel.outgoing.manifest.chunk_bytes != chunk_bytes:
            parcel.outgoing = Outgoing(parcel.entry.payload, chunk_bytes=chunk_bytes)
        return parcel.outgoing


def _is_about(verdict: Verdict, header: UpdateReady | Report) -> bool:
    """Compare the task, or the round with an aggregator that names none."""
    return task_id_of(header) == verdict.task_id if verdict.task_id else header.round == verdict.round


def _entry(header: UpdateReady | Report, payload: bytes) -> Entry:
    digest = header.payload.sha256 if isinstance(header, UpdateReady) else ""
    return Entry(
        job=header.job, task_id=task_id_of(header), digest=digest, header=encode(header), payload=payload
    )


def _header(entry: Entry) -> UpdateReady | Report:
    """The header of an entry; WireError if that, or the payload, is damaged."""
    header = decode(entry.header)
    if not isinstance(header, UpdateReady | Report):
        raise WireError(
            f"outbox: a {type(header).__name__} in {entry.task_id}; expected UpdateReady or Report"
        )
    if isinstance(header, UpdateReady) and sha256(entry.payload).hexdigest() != entry.digest:
        raise WireError("SHA-256 of the payload differs")
    return header
