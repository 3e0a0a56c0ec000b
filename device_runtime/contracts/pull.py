"""A transfer being pulled: when to ask for what; a slow link is told from a dead one by the pace that it had."""

import math

from fleetune.device_runtime.contracts.transfer import Incoming
from fleetune.device_runtime.contracts.wire import Chunk, Request, TransferManifest

STALL_S = 10.0
"""Least time without a chunk after which one is asked for again."""
PATIENCE = 3
"""Chunks are given so many times as long as they take at the measured pace."""
SLOWEST_BYTES_S = 10e3
"""Pace of a link of which nothing is known yet."""
FLYING_S = 10.0
"""No more is on its way at once than comes in so long, two chunks at least."""
WAIT_MAX_S = 600.0


class Pull:
    """A transfer being pulled. Times out on lack of progress, never on elapsed time.

    A window of chunks is on its way at once, and more are asked for when half of it has arrived. The window grows
    with every chunk up to ``window``, or to what comes in ``FLYING_S``. If nothing arrives for ``PATIENCE`` times as long as
    what is on its way takes, the window halves and one of these chunks is asked for again; if that comes and the others
    still do not, so are they: the connection loses nothing while it stands, unless an end is overrun.
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
    ) -> None:
        """Start a pull at ``now``; WireError as :class:`Incoming`."""
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
    def progress_at(self) -> float:
        """Time at which a new chunk arrived last, the pull began or was restarted."""
        return self._progress_at

    @property
    def asked_at(self) -> float:
        """Time at which chunks were asked for last."""
        return self._asked_at

    @property
    def waits_until(self) -> float:
        """Time at which what is on its way counts as lost, if nothing comes before."""
        wait_s = min(self._wait_s * 2.0 ** min(self._num_stalls, 10), WAIT_MAX_S)
        return max(self._progress_at, self._asked_at) + wait_s

    def cut_anew(self, manifest: TransferManifest, *, size_bytes_max: int, now: float) -> "Pull":
        """Go on with the same content in chunks of another size; WireError as :class:`Incoming`."""
        pull = Pull(
            manifest, size_bytes_max=size_bytes_max, now=now, window=self.window_max, stall_s=self._stall_s
        )
        pull._incoming.take_over(self._incoming)
        pull._s_per_byte = self._s_per_byte
        return pull

    def add(self, chunk: Chunk, now: float) -> bool:
        """Store a chunk; False if it was here already. WireError as :meth:`Incoming.add`."""
        if not self._incoming.add(chunk):
            return False
        if (asked_at := self._flying.pop(chunk.index, None)) is not None:
            self._is_answered = chunk.index in self._again
            self._learn(now - max(asked_at, self._progress_at), len(chunk.data))
        self._window = min(self.window_max, self._window + 1)
        self._progress_at = now
        return True

    def due(self, now: float) -> Request | None:
        """Return the request to send now, if it is time for one; call it after every chunk and now and then."""
        wanted = self._lost(now) or self._next()
        if wanted:
            self._flying.update(dict.fromkeys(wanted, now))
            self._asked_at = now
        return self._incoming.request_of(wanted, limit=len(wanted))

    @property
    def due_at(self) -> float:
        """Time from which :meth:`due` has a request, if no chunk comes before; inf when every chunk is here."""
        if self._next():
            return -math.inf
        return self.waits_until if self._flying else math.inf

    def restart(self, now: float) -> None:
        """After a reconnection: count what is on its way as lost, so that the next request is due at once, for half as many."""
        if self._flying:
            self._window = max(1, self._window // 2)
        self._flying.clear()
        self._progress_at = now

    def content(self) -> bytes:
        """Return the whole; WireError as :meth:`Incoming.content`."""
        return self._incoming.content()

    @property
    def _wait_s(self) -> float:
        """How long what is on its way may take."""
        manifest = self._incoming.manifest
        flying_bytes = min(len(self._flying) * manifest.chunk_bytes, manifest.size_bytes)
        return max(self._stall_s, PATIENCE * flying_bytes * (self._s_per_byte or 1 / SLOWEST_BYTES_S))

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
        self._again.update(lost)
        self._is_answered = False
        return lost

    def _next(self) -> list[int]:
        window = self._room()
        if len(self._flying) > window // 2:
            return []
        wanted = [i for i in self._incoming.missing() if i not in self._flying]
        return wanted[: window - len(self._flying)]

    def _room(self) -> int:
        """Most chunks on their way now."""
        chunk_s = self._s_per_byte * self._incoming.manifest.chunk_bytes
        most = max(2, int(FLYING_S / chunk_s)) if chunk_s else self._window
        return max(1, min(self._window, most, self.window_max))
