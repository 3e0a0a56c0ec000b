"""Which devices want the same chunks at the same time: those are published once for all of them. No socket, no clock.

A *stream* is one transfer, offered under one name to all who are offered it until its first part is published. Each of its parts
is published once. Who asks for a part later is late: it is offered the transfer anew, under the name of the next stream, and
shares that with the others who are late. Late too often it is served alone, and so is who is alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from fleetune.device_runtime.contracts.parts import GATHER_S, chunks_of, part_of
from fleetune.device_runtime.contracts.wire import Request, TransferManifest
from fleetune.device_runtime.errors import WireError

QUIET_S = 0.25
"""A part is published when no further device has asked for so long, or none is left that was expected to; where devices take
longer to ask, when none has for twice as long as they took lately."""
LATE_MAX = 8
"""So often in one transfer a device is offered another stream, before it is served alone."""
_NEWEST = 0.1
"""What the newest counts for."""
SHARED_BYTES_MIN = 16 * 1024
"""What is shorter goes to each device alone: to listen costs two packets, and may cost a wait."""


class Answer(Enum):
    """What is to be done about a request."""

    GATHERED = "it is answered with others"
    LATE = "offer it anew"
    ALONE = "serve it alone"


class Pass(NamedTuple):
    """Chunks to be published, and who waits for them."""

    stream: str
    part: int
    request: Request
    """As if one device asked for all of them."""
    devices: tuple[str, ...]


_Key = tuple[str, int]
"""SHA-256 and size of the chunks: what a transfer is known by."""


@dataclass
class _Gathering:
    """Those who have asked for a part that is not published yet."""

    since: float
    last: float
    missing: int = 0
    """Bitmap of all that is asked for."""
    devices: dict[str, None] = field(default_factory=dict)
    has_new: bool = False
    """Whether one of them asks for the first time in this stream: others may, too."""
    is_hot: bool = False
    """Whether another device asked for the same just before: more may come, though none is expected."""


@dataclass
class _Stream:
    name: str
    key: _Key
    bitmap_bytes: int = 0
    members: dict[str, float] = field(default_factory=dict)
    """Who was offered it, and when it was last told something that it may ask after."""
    new: set[str] = field(default_factory=set)
    """Members that were offered it and have asked for nothing."""
    late: set[str] = field(default_factory=set)
    awaited: dict[int, set[str]] = field(default_factory=dict)
    """Who got the part before, by part."""
    published: set[int] = field(default_factory=set)
    gatherings: dict[int, _Gathering] = field(default_factory=dict)


class Streams:
    """Those of one life of an aggregator."""

    def __init__(self, session: str, *, is_on: bool = True) -> None:
        """Begin with none; ``session`` is a part of every name, ``is_on``: whether anything is to be shared."""
        self._session, self._is_on = session, is_on
        self._number = 0
        self._listeners: set[str] = set()
        self._of: dict[str, _Stream] = {}
        self._open: dict[_Key, _Stream] = {}
        """Streams of which nothing is published yet."""
        self._named: dict[str, _Stream] = {}
        self._late: dict[str, tuple[_Key, int]] = {}
        """Who was late, for which transfer and how often."""
        self._asked: dict[_Key, float] = {}
        """When a transfer was asked for last by who had not asked for it before."""
        self._gathering: dict[tuple[str, int], _Stream] = {}
        self._lag_s = 0.0
        """How long devices took to ask, lately."""

    def listens(self, device_id: str, *, is_able: bool) -> None:
        """A device says whether it can listen."""
        if is_able and self._is_on:
            self._listeners.add(device_id)
        else:
            self._listeners.discard(device_id)

    def name_for(self, device_id: str, transfer: TransferManifest, now: float) -> str:
        """Name of the stream that a device is offered a transfer in; empty for none. It leaves every other."""
        key = (transfer.sha256, transfer.chunk_bytes)
        known = self._of.get(device_id)
        if known and known.key == key and device_id not in known.late:
            return known.name
        self.leave(device_id)
        if device_id not in self._listeners or transfer.size_bytes < SHARED_BYTES_MIN:
            return ""
        stream = self._open.get(key) or self._begun(key, transfer)
        stream.members[device_id] = now
        stream.new.add(device_id)
        self._of[device_id] = stream
        return stream.name

    def ask(self, device_id: str, request: Request, now: float) -> Answer:
        """Take a request for chunks of a part.

        Raises:
            WireError: a bitmap of another length than the transfer's, or without a chunk.
        """
        stream = self._named.get(request.shared)
        if stream is None or device_id not in stream.members or request.sha256 != stream.key[0]:
            return Answer.ALONE
        missing = int.from_bytes(request.missing, "little")
        if len(request.missing) != stream.bitmap_bytes or not missing:
            raise WireError(
                f"bitmap of {len(request.missing)} bytes; expected {stream.bitmap_bytes}, not all zero"
            )
        part = part_of((missing & -missing).bit_length() - 1)
        self._lag_s += _NEWEST * (min(now - stream.members[device_id], GATHER_S) - self._lag_s)
        is_new = device_id in stream.new
        stream.new.discard(device_id)
        stream.awaited.get(part, set()).discard(device_id)
        if part in stream.published:
            return self._too_late(device_id, stream)
        is_first = part not in stream.gatherings
        gathering = stream.gatherings.setdefault(part, _Gathering(now, now))
        self._gathering[stream.name, part] = stream
        gathering.last = now
        gathering.missing |= missing & _bits(part)
        gathering.devices[device_id] = None
        gathering.has_new |= is_new
        is_hot = is_new and self._is_hot(stream.key, now)
        gathering.is_hot |= is_hot and is_first
        return Answer.GATHERED

    def leave(self, device_id: str) -> None:
        """A device wants nothing in a stream any more: it is gone, asks for itself alone, or is offered something else."""
        if (stream := self._of.pop(device_id, None)) is None:
            return
        del stream.members[device_id]
        for those in (stream.new, stream.late, *stream.awaited.values()):
            those.discard(device_id)
        for part in [*stream.gatherings]:
            stream.gatherings[part].devices.pop(device_id, None)
            if not stream.gatherings[part].devices:
                self._end(stream, part)
        if not stream.members:
            del self._named[stream.name]
            if self._open.get(stream.key) is stream:
                del self._open[stream.key]

    @property
    def due_at(self) -> float:
        """Time at which ``due`` has something, if nobody asks before; inf for never."""
        times = (self._ready_at(stream, part) for (_, part), stream in self._gathering.items())
        return min(times, default=math.inf)

    def due(self, now: float) -> Iterator[Pass]:
        """Yield what is to be published now, each once."""
        for (name, part), stream in [*self._gathering.items()]:
            if now < self._ready_at(stream, part):
                continue
            gathering = stream.gatherings[part]
            self._end(stream, part)
            self._publish(stream, part, gathering, now)
            missing = gathering.missing.to_bytes(stream.bitmap_bytes, "little")
            request = Request(sha256=stream.key[0], missing=missing, limit=len(chunks_of(part)))
            yield Pass(name, part, request, tuple(gathering.devices))

    def _begun(self, key: _Key, transfer: TransferManifest) -> _Stream:
        self._number += 1
        num_chunks = -(-transfer.size_bytes // transfer.chunk_bytes)
        stream = _Stream(f"{self._session[:32]}-{self._number}", key, (num_chunks + 7) // 8)
        self._named[stream.name] = self._open[key] = stream
        return stream

    def _publish(self, stream: _Stream, part: int, gathering: _Gathering, now: float) -> None:
        """Take note that a part is published: who got it is expected to ask for the next."""
        if self._open.get(stream.key) is stream:
            del self._open[stream.key]
        stream.published.add(part)
        stream.members.update(dict.fromkeys(gathering.devices, now))
        stream.awaited.pop(part, None)
        following = stream.gatherings.get(part + 1)
        stream.awaited[part + 1] = set(gathering.devices) - set(following.devices if following else ())

    def _is_hot(self, key: _Key, now: float) -> bool:
        """Whether a transfer was asked for just before; now it is."""
        is_hot = now - self._asked.pop(key, -math.inf) <= self._quiet_s
        self._asked[key] = now  # the newest comes last
        while now - self._asked[oldest := next(iter(self._asked))] > GATHER_S:
            del self._asked[oldest]
        return is_hot

    def _too_late(self, device_id: str, stream: _Stream) -> Answer:
        key, times = self._late.get(device_id, (stream.key, 0))
        if key != stream.key:
            times = 0
        if times >= LATE_MAX:
            return Answer.ALONE
        self._late[device_id] = stream.key, times + 1
        stream.late.add(device_id)
        return Answer.LATE

    def _ready_at(self, stream: _Stream, part: int) -> float:
        gathering = stream.gatherings[part]
        is_whole = not stream.awaited.get(part) and not (gathering.has_new and stream.new)
        if is_whole and not gathering.is_hot:
            return -math.inf
        return min(gathering.last + self._quiet_s, gathering.since + GATHER_S)

    @property
    def _quiet_s(self) -> float:
        return min(max(QUIET_S, 2 * self._lag_s), GATHER_S / 2)

    def _end(self, stream: _Stream, part: int) -> None:
        del stream.gatherings[part], self._gathering[stream.name, part]


def _bits(part: int) -> int:
    chunks = chunks_of(part)
    return (1 << chunks.stop) - (1 << chunks.start)
