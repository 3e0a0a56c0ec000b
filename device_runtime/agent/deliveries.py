"""What a device owes the aggregator: announced until there is a verdict, served in chunks, kept in the outbox."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import Entry, Outbox
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import (
    Report,
    Request,
    TransferManifest,
    UpdateReady,
    Verdict,
    decode,
    encode,
)
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.network.connection import Connection, send

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


class Deliveries:
    """The updates and reports of one device for one job; others' entries in the outbox are left alone."""

    def __init__(self, link: Connection, outbox: Outbox, identity: Identity) -> None:
        self._link, self._outbox, self._topic = link, outbox, identity.up
        self._parcels = [_Parcel(e, _header(e)) for e in outbox.pending() if e.job == identity.job]

    def __len__(self) -> int:
        return len(self._parcels)

    def holds(self, round_number: int) -> bool:
        """Whether something of this round waits for its verdict."""
        return any(p.entry.round == round_number for p in self._parcels)

    def put(
        self,
        header: Report | Callable[[TransferManifest], UpdateReady],
        payload: bytes = b"",
        *,
        facts: dict[str, bytes],
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

    def announce(self, now: float) -> None:
        """Announce what is due, ever less often."""
        for parcel in self._parcels:
            if now >= parcel.due:
                parcel.due, parcel.pause_s = now + parcel.pause_s, min(2 * parcel.pause_s, REPEAT_MAX_S)
                send(self._link, self._topic, encode(self._fresh_header(parcel)))

    def rush(self) -> None:
        """Announce everything at the next opportunity: the aggregator may know nothing of it."""
        for parcel in self._parcels:
            parcel.due, parcel.pause_s = 0.0, REPEAT_S

    def serve(self, request: Request, now: float) -> None:
        """Send the chunks asked for.

        Raises:
            WireError: a request for what is not here, or with a bitmap of another length.
        """
        parcel = next((p for p in self._parcels if p.entry.digest == request.sha256), None)
        if parcel is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not here")
        parcel.due = now + SERVED_S
        for chunk in self._outgoing(parcel).chunks(request):
            send(self._link, self._topic, encode(chunk))

    def settle(self, verdict: Verdict) -> UpdateReady | Report | None:
        """Let go of what the verdict is about, and return its header; None if it is not here (any more)."""
        for parcel in self._parcels:
            if (parcel.entry.round, parcel.entry.digest) == (verdict.round, verdict.digest):
                self._drop(parcel)
                return parcel.header
        return None

    def drop(self, round_number: int) -> None:
        """Let go of everything of a round."""
        for parcel in [p for p in self._parcels if p.entry.round == round_number]:
            self._drop(parcel)

    def _drop(self, parcel: _Parcel) -> None:
        self._outbox.acknowledge(parcel.entry.job, parcel.entry.round, parcel.entry.digest)
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


def _entry(header: UpdateReady | Report, payload: bytes) -> Entry:
    digest = header.payload.sha256 if isinstance(header, UpdateReady) else ""
    return Entry(job=header.job, round=header.round, digest=digest, header=encode(header), payload=payload)


def _header(entry: Entry) -> UpdateReady | Report:
    header = decode(entry.header)
    if not isinstance(header, UpdateReady | Report):
        raise WireError(
            f"outbox: a {type(header).__name__} in round {entry.round}; expected UpdateReady or Report"
        )
    return header
