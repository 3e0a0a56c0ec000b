"""A transfer being pulled: when to ask for what; a slow link is told from a dead one by the pace that it had."""

import math
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from itertools import islice

from fleetune.device_runtime.contracts.parts import FIRST_CHUNKS, GATHER_S, PART_CHUNKS, chunks_of, part_of
from fleetune.device_runtime.contracts.transfer import Incoming
from fleetune.device_runtime.contracts.wire import Chunk, Request, TransferManifest

STALL_S = 10.0
"""Least time without a chunk after which one is asked for again."""
PATIENCE = 3
"""Chunks are given so many times as long as they take at the measured pace."""
SLOWEST_BYTES_S = 2.5e3
"""Pace of a link of which nothing is known yet: a narrow one that several share is not asked twice for its first chunk."""
HEARD_BYTES_S = 10e3
"""Pace at least at which the first chunk of a stream comes, or the stream is not heard."""
FLYING_S = 10.0
"""No more is on its way at once than comes in so long, two chunks at least."""
WAIT_MAX_S = 600.0
RETURN_S = 5.0
"""After a reconnection a pull that was in a stream waits so long to be told of the next one."""


class Pull:
    """A transfer being pulled. Times out on lack of progress, never on elapsed time.

    A window of chunks is on its way at once, and more are asked for when half of it has arrived. The window grows
    with every chunk up to ``window``, or to what comes in ``FLYING_S``. If nothing arrives for ``PATIENCE`` times as long as
    what is on its way takes, the window halves and one of these chunks is asked for again; if that comes and the others
    still do not, so are they: the connection loses nothing while it stands, unless an end is overrun.

    In a *stream*, what is published once for all who ask, whole parts are asked for. A link on which a part takes longer than
    ``FLYING_S`` leaves it, and so does one that has lost something: from then on the pull asks for itself alone.
    """

    window_max: int
    """Most chunks on their way at once; may be changed at any time."""

    def __init__(
        self,
        manifest: TransferManifest,
        *,
        size_bytes_max: int,
        now: float,
        window: int = 16,
        stall_s: float = STALL_S,
        stream: str = "",
    ) -> None:
        """Start a pull at ``now``, in a stream or alone; WireError as :class:`Incoming`."""
        self._incoming = Incoming(manifest, size_bytes_max=size_bytes_max)
        self._flying: dict[int, float] = {}
        """Chunks on their way, and when they were asked for last."""
        self._again: set[int] = set()
        """Those that were asked for more than once: which of two has come is not to be known."""
        self.window_max, self._window = window, min(4, window)
        self._stall_s, self._num_stalls, self._is_answered = stall_s, 0, False
        self._s_per_byte = 0.0
        """Measured; 0 before the first chunk."""
        self._progress_at = self._asked_at = now
        self._stream, self._parts = stream, dict[int, str]()
        """What it asks in, and the parts that are asked for in a stream and not whole, with its name."""
        self._unheard: set[int] = set()
        """Parts of which no chunk has come yet."""
        self._has_begun, self.is_deaf = False, False
        """Whether any chunk came; and whether a stream was left as none had: perhaps this side may not hear it."""
        self._pauses_until = -math.inf

    @property
    def parts(self) -> AbstractSet[tuple[int, str]]:
        """What to listen to, for what is on its way: (part, stream)."""
        return self._parts.items()

    @property
    def is_wide(self) -> bool:
        """Whether a part comes in ``FLYING_S`` on this link, as far as is known."""
        return self._s_per_byte * self._incoming.manifest.chunk_bytes * PART_CHUNKS <= FLYING_S

    def join(self, stream: str) -> None:
        """Ask in another stream from now on, empty: alone; what was asked for and has not begun to come is asked for anew."""
        if stream == self._stream:
            return
        self._drop_unheard()
        self._stream, self._pauses_until = stream, -math.inf

    @property
    def done(self) -> bool:
        """Whether every chunk is here."""
        return self._incoming.done

    @property
    def share(self) -> float:
        """Share of the chunks that is here."""
        return self._incoming.share

    @property
    def sha256(self) -> str:
        """Which transfer this is."""
        return self._incoming.manifest.sha256

    @property
    def num_flying(self) -> int:
        """Chunks on their way; none once they count as lost."""
        return 0 if self._num_stalls else len(self._flying)

    @property
    def progress_at(self) -> float:
        """Time at which a new chunk arrived last, the pull began or was restarted."""
        return self._progress_at

    @property
    def s_per_byte(self) -> float:
        """Measured pace; 0 before the first chunk."""
        return self._s_per_byte

    def silent_at(self, s_per_byte: float, *, least_s: float) -> float:
        """Time from which the other end does not answer, if nothing comes before; inf if nothing was asked of it.

        Args:
            s_per_byte: pace to go by before the first chunk.
            least_s: what an answer may take.
        """
        if not self._flying:
            return math.inf
        wait_s = PATIENCE * self._flying_bytes * (self._s_per_byte or s_per_byte)
        return max(self._progress_at, self._asked_at) + max(self._stall_s, least_s, wait_s)

    @property
    def asked_at(self) -> float:
        """Time at which chunks were asked for last."""
        return self._asked_at

    @property
    def expects_until(self) -> float:
        """Time until which the other end need not be told that this one still waits; with a stream it first asks alone."""
        return self.waits_until + (self._stall_s if self._stream and not self._has_begun else 0.0)

    @property
    def waits_until(self) -> float:
        """Time at which what is on its way counts as lost, if nothing comes before."""
        wait_s = min(self._wait_s * 2.0 ** min(self._num_stalls, 10), WAIT_MAX_S)
        return max(self._progress_at, self._asked_at) + wait_s

    def is_overdue(self, now: float) -> bool:
        """Whether what is on its way should be here by now, at the pace that is known."""
        return now >= max(self._progress_at, self._asked_at) + max(self._stall_s, self._flying_s)

    def cut_anew(self, manifest: TransferManifest, *, size_bytes_max: int, now: float) -> "Pull":
        """Go on with the same content in chunks of another size; WireError as :class:`Incoming`."""
        pull = Pull(
            manifest, size_bytes_max=size_bytes_max, now=now, window=self.window_max, stall_s=self._stall_s
        )
        pull._stream = self._stream
        pull._incoming.take_over(self._incoming)
        pull._s_per_byte = self._s_per_byte
        return pull

    def add(self, chunk: Chunk, now: float) -> bool:
        """Store a chunk; False if it was here already. WireError as :meth:`Incoming.add` and, of the last one, its ``verify``."""
        if not self._incoming.add(chunk):
            return False
        self._has_begun = True
        if (asked_at := self._flying.pop(chunk.index, None)) is not None:
            self._is_answered = chunk.index in self._again
            if not self._begins_part(chunk.index):  # the first one came when others had asked, too
                self._learn(now - max(asked_at, self._progress_at), len(chunk.data))
        self._window = min(self.window_max, self._window + 1)
        self._progress_at = now
        self._incoming.verify()
        return True

    def due(self, now: float) -> Request | None:
        """Return the request to send now, if it is time for one; call it after every chunk and now and then."""
        wanted = self._lost(now) or (self._next() if now >= self._pauses_until else [])
        if wanted:
            self._flying.update(dict.fromkeys(wanted, now))
            self._asked_at = now
        if wanted and self._stream:
            part = part_of(wanted[0])
            self._parts[part] = self._stream
            self._unheard.add(part)
        return self._incoming.request_of(wanted, limit=len(wanted), shared=self._stream)

    @property
    def due_at(self) -> float:
        """Time from which :meth:`due` has a request, if no chunk comes before; inf when every chunk is here."""
        if self._next():
            return self._pauses_until
        return self.waits_until if self._flying else math.inf

    def restart(self, now: float) -> None:
        """After a reconnection: count what is on its way as lost, so that the next request is due at once, for half as many."""
        if self._flying:
            self._window = max(1, self._window // 2)
        if self._stream:
            self._pauses_until = now + RETURN_S
        self._stream = ""
        for lost in (self._flying, self._parts, self._unheard):
            lost.clear()
        self._progress_at = now

    def content(self) -> bytes:
        """Return the whole; WireError as :meth:`Incoming.content`."""
        return self._incoming.content()

    @property
    def _wait_s(self) -> float:
        """How long what is on its way may take."""
        manifest = self._incoming.manifest
        if self._stream and not self._has_begun:
            return max(self._stall_s, GATHER_S + manifest.chunk_bytes / HEARD_BYTES_S)
        return max(self._stall_s, PATIENCE * self._flying_s)

    @property
    def _flying_s(self) -> float:
        """How long what is on its way takes at the pace that is known."""
        return self._flying_bytes * (self._s_per_byte or 1 / SLOWEST_BYTES_S)

    @property
    def _flying_bytes(self) -> int:
        manifest = self._incoming.manifest
        return min(len(self._flying) * manifest.chunk_bytes, manifest.size_bytes)

    def _learn(self, took_s: float, size_bytes: int) -> None:
        """Take the pace of a chunk: a slower one counts a half, a quicker one an eighth, as several may come in one moment."""
        pace, known = took_s / size_bytes, self._s_per_byte
        if not self._is_answered:
            self._num_stalls = 0
        elif pace <= known:
            return
        share = 1.0 if not known else 0.5 if pace > known else 0.125
        self._s_per_byte = known + share * (pace - known)

    def _lost(self, now: float) -> list[int]:
        if not self._flying or now < self.waits_until:
            return []
        self._num_stalls += 1
        if not self._is_answered:
            self._window = max(1, self._window // 2)
        lost = sorted(self._flying)[: self._window if self._is_answered else 1]
        self.is_deaf = bool(self._stream) and not self._has_begun
        self._stream = ""
        self._unheard.clear()  # what comes now was asked for alone: its pace counts
        self._again.update(lost)
        self._is_answered = False
        return lost

    def _next(self) -> list[int]:
        if not self.is_wide:
            self._stream = ""  # what is on its way is still listened to
        if self._stream:
            return self._next_part()
        window = self._room()
        if len(self._flying) > window // 2:
            return []
        return [*islice(self._wanted(), window - len(self._flying))]

    def _wanted(self) -> Iterator[int]:
        """What is missing and not on its way, lowest first."""
        return (i for i in self._incoming.missing() if i not in self._flying)

    def _room(self) -> int:
        """Most chunks on their way now."""
        chunk_s = self._s_per_byte * self._incoming.manifest.chunk_bytes
        most = max(2, int(FLYING_S / chunk_s)) if chunk_s else self._window
        return max(1, min(self._window, most, self.window_max))

    def _next_part(self) -> list[int]:
        """What is missing of the next part, once most of what was asked for is here."""
        is_known = self._s_per_byte > 0 or not self._flying
        if len(self._flying) > FIRST_CHUNKS or not is_known:
            return []
        wanted = [*islice(self._wanted(), PART_CHUNKS)]
        return [i for i in wanted if part_of(i) == part_of(wanted[0])]

    def _begins_part(self, index: int) -> bool:
        """Whether a chunk is the first of a part that came; a part that is whole is listened to no longer."""
        part = part_of(index)
        is_first = part in self._unheard
        self._unheard.discard(part)
        if part in self._parts and not any(i in self._flying for i in chunks_of(part)):
            del self._parts[part]
        return is_first

    def _drop_unheard(self) -> None:
        for part in self._unheard:
            self._parts.pop(part, None)
            for index in chunks_of(part):
                self._flying.pop(index, None)
        self._unheard.clear()
