"""A device makes itself known: its status, and a hello after every connection, new session and long silence."""

from collections.abc import Callable
from math import inf

from fleetune.device_runtime.agent.home import Home
from fleetune.device_runtime.agent.jitter import Jitter
from fleetune.device_runtime.agent.telling import Telling
from fleetune.device_runtime.contracts.wire import Hello, encode
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.underway import Underway

HELLO_S = 30.0
"""A device that has nothing to do and has heard nothing for so long, or a little less, says hello again."""
SPREAD_S = 1.0
"""Within so long those say hello that all have the same reason to: the server is back, or the aggregator."""
_FRESH_S = 5.0
"""Who said hello so recently says it again at once: it came alone."""


class Presence:
    """What the aggregator knows of this device, and the device of the aggregator."""

    def __init__(self, home: Home, telling: Telling, *, num_samples: int) -> None:
        """Prepare; ``home.outbox`` remembers, over restarts, that an aggregator of the job was heard."""
        self._telling, self._underway = telling, Underway(home.link)
        self.heard_at = 0.0
        """When the last message came."""
        self._link, self._outbox, self._identity = home.link, home.outbox, home.identity
        self._num_samples = num_samples
        self._hello_s = self._pause_s = home.hello_s or HELLO_S
        self._connections = -1
        self._session = ""
        self._jitter = Jitter(home.identity.device_id)
        self._greets_at = inf
        """When it says hello whatever it has to do."""
        self._greeted_at = -inf
        self._hello_due = 0.0
        self.was_away = False
        """Whether the last hello came because either side was away: what was on its way may be lost."""

    def tell_status(self, now: float, *, paused: str) -> None:
        """Say that it is online, why it pauses (empty if it does not), and to who looks what it is at."""
        topic, _ = self._identity.will
        status = self._identity.status(online=True, paused=paused, **self._telling.words(now))
        send(self._link, topic, status, retain=True)

    def rush(self) -> None:
        """Say hello at the next opportunity."""
        self._greets_at = -inf

    def return_to(self, now: float) -> None:
        """Say hello soon: either side was away, and all devices notice now."""
        is_alone = now - self._greeted_at < _FRESH_S or self._greeted_at == -inf
        self._greets_at = min(self._greets_at, now + (0.0 if is_alone else self._jitter.within(SPREAD_S)))

    def greet(
        self,
        now: float,
        *,
        version: int,
        holds: str,
        mask: Callable[[], str],
        waits_until: float,
        paused: str,
        original: str = "",
        listens: bool = False,
    ) -> bool:
        """Say hello if it is time to; True if so. One that is still on its way to the server is not said again.

        Args:
            now: the time.
            version: of the adapter that it holds; -1 for none.
            holds: SHA-256 of the adapter file that differences may be taken from; empty for none.
            mask: gives the SHA-256 of the mask that it holds, empty for none; asked only for a hello, as it reads a file.
            waits_until: time from which nothing but a message gives it work; inf while it has some.
            paused: as of :meth:`tell_status`.
            original: SHA-256 of the artifact's own adapter file, where differences may be taken from that too.
            listens: whether it takes what is published once for all.
        """
        if self._link.connections != self._connections:
            self._connections = self._link.connections
            self.tell_status(now, paused=paused)
            self.return_to(now)
        self.was_away = now >= self._greets_at
        if not self.was_away and now < max(self._hello_due, waits_until):
            return False
        self._greets_at, self._greeted_at = inf, now
        self._pause_s = self._jitter.around(self._hello_s) if self._hello_s < inf else inf
        self._hello_due = now + self._pause_s
        identity = self._identity
        hello = Hello(
            device_id=identity.device_id,
            artifact=identity.artifact,
            role=identity.role,
            num_samples=self._num_samples,
            version=version,
            holds=holds,
            mask=mask(),
            original=original,
            listens=listens,
            connection=f"{identity.session}-{self._connections}" if identity.session else "",
        )
        said = encode(hello)
        self._underway.once(said, lambda: send(self._link, identity.up, said))
        return True

    def due_at(self, *, waits_until: float) -> float:
        """Time of the next hello, if nothing is heard before; ``waits_until`` as of :meth:`greet`."""
        if self._link.connections != self._connections:
            return -inf
        return min(self._greets_at, max(self._hello_due, waits_until))

    def heard(self, now: float) -> None:
        """A message came: no hello for a while."""
        self.heard_at = now
        self._hello_due = max(self._hello_due, now + self._pause_s)

    def meet(self, session: str, now: float) -> bool:
        """The aggregator says which session of it this is; True if it is a new one, which knows nothing of the device."""
        if session == self._session:
            return False
        self._session = session
        self._outbox.remember(self._session_key, session.encode())
        self.return_to(now)
        return True

    @property
    def is_met(self) -> bool:
        """Whether an aggregator of this job was heard in this life."""
        return bool(self._session)

    @property
    def has_met(self) -> bool:
        """Whether an aggregator of this job was ever heard, in an earlier life too."""
        return bool(self._session or self._outbox.recall(self._session_key))

    def leave(self, session: str = "") -> None:
        """The job is over in this session of the aggregator, by default in the one met last."""
        met = session or self._session
        kept = met.encode() if met else self._outbox.recall(self._session_key)
        self._outbox.remember(f"left/{self._identity.job}", kept or b"")

    def has_left(self, session: str) -> bool:
        """Whether this device stopped, in an earlier life, because the job was over in this session: now it waits for more."""
        return self._outbox.recall(f"left/{self._identity.job}") == session.encode()

    @property
    def _session_key(self) -> str:
        return f"session/{self._identity.job}"
