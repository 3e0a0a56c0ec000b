"""How a client stands with its server: connected, refused, denied or displaced, and what follows; knows no paho."""

import contextlib
import logging
import queue
import time
from collections.abc import Callable, Sequence

from fleetune.device_runtime.network import refusals
from fleetune.device_runtime.network.address import Address
from fleetune.device_runtime.network.hooks import Hooks
from fleetune.device_runtime.network.interruptions import Evictions, Outage

log = logging.getLogger(__name__)

HUNG_UP = -1
"""In place of a reason code: the server ended the connection and said nothing."""
_REFUSED_S = 60.0
"""Who was let in before and is refused for so long stops: its login was taken away."""
_TELL_EVERY_S = 60.0


class Standing:
    """Told what the server does, it warns, gives up, or looks for another holder of the client id.

    Args:
        address: of the server.
        client_id: what the server knows this side by.
        hooks: whom to tell.
        leave: ends the connection.
        look: whether another client speaks under the will's topic within so many seconds.
        why_not: why the server turns this side's certificate away; empty if it does not.
    """

    def __init__(
        self,
        address: Address,
        client_id: str,
        hooks: Hooks,
        *,
        leave: Callable[[], None],
        look: Callable[[float], bool],
        why_not: Callable[[], str] = lambda: "",
    ) -> None:
        self._address, self._client_id, self._hooks = address, client_id, hooks
        self._leave, self._look, self._why_not = leave, look, why_not
        self.is_stopping = False
        self._has_connected = False
        self._outcome: queue.Queue[tuple[str | None, int]] = queue.Queue(1)
        self._outage, self._evictions = Outage(), Evictions()
        self._ready_at: float | None = None
        self._refused_at: float | None = None
        self._moved_bytes = 0
        self._told_at: dict[int, float] = {}

    @property
    def who(self) -> str:
        """Name whom the server knows: a user, or a client without a user name."""
        username = self._address.username
        return f"user {username!r}" if username else f"client {self._client_id!r} without a user name"

    def wait(self, timeout_s: float) -> tuple[str | None, int]:
        """Wait for the outcome of the first connection: (why not, reason code), (None, 0) if it stands."""
        try:
            return self._outcome.get(timeout=timeout_s)
        except queue.Empty:
            return "it takes the connection and says nothing", refusals.UNSUPPORTED_VERSION

    def moved(self, size_bytes: int) -> None:
        """Count what arrived on this connection, either way."""
        self._moved_bytes += size_bytes

    def ready(self, packet_bytes_max: int) -> None:
        """Take note that it is connected and subscribed; the server takes packets of so many bytes, 0: of any."""
        self._has_connected, self._refused_at = True, None
        self._ready_at, self._moved_bytes = time.monotonic(), 0
        self._hooks.on_ready(packet_bytes_max)
        log.info("%s: connected as %s", self._address.shown, self._client_id)
        if away_s := self._outage.ends(time.monotonic()):
            log.warning("%s: connected again after %.0f s", self._address.shown, away_s)
        self._tell(None, 0)

    def unfit(self, packet_bytes_max: int) -> None:
        """Give up a server whose packets are too small."""
        self._tell(
            f"its packets of at most {packet_bytes_max} bytes are too small", refusals.PACKET_TOO_LARGE
        )

    def refused(self, code: int, name: str) -> None:
        """Take a refused connection: the first one ends, later ones are tried for a while."""
        may = f"check the user name, the password, and whether this user may connect as {self._client_id}"
        reason = refusals.explain(code, name, denied=may)
        self._tell(reason, code)
        if self._has_connected:
            self._bear(code, reason)

    def denied(self, code: int, name: str, what: str) -> None:
        """Warn or give up: the server refuses ``what`` ("a message of") a client that it let in."""
        reason = refusals.explain(code, name, denied=self._hooks.party.denied)
        self._warn_or_fail(
            code, f"refuses {what} {self._client_id}: {reason}", is_passing=refusals.passes(code)
        )

    def unheard(self, topics: Sequence[str]) -> None:
        """Give up: the server lets it in and refuses the subscription to ``topics``."""
        reason = f"no permission to subscribe to {', '.join(topics)}"
        reason = refusals.explain(refusals.NOT_AUTHORIZED, reason, denied=self._hooks.party.denied)
        self._tell(reason, refusals.NOT_AUTHORIZED)
        if self._has_connected:
            self._fail(f"{self._address.shown} refuses {self.who}: {reason}")

    def lost(self, code: int, name: str, *, is_told: bool) -> None:
        """Take the end of the connection; ``is_told``: the server itself has said why."""
        log.info("%s: disconnected: %s", self._address.shown, name)
        self._tell("it hangs up", HUNG_UP)
        stood_at, self._ready_at = self._ready_at, None
        if self.is_stopping or not self._has_connected:
            return
        self.missed(name)
        is_taken = is_told and code == refusals.TAKEN_OVER
        if is_told and not is_taken:
            self.denied(code, name, "the connection of")
        if stood_at is None and not is_told and (reason := self._why_not()):
            self._bear(refusals.NOT_AUTHORIZED, reason)
        if stood_at is not None and not self.is_stopping:
            self._look_for_another(time.monotonic() - stood_at, is_told=is_taken)

    def missed(self, reason: str) -> None:
        """Say now and then that there is no connection."""
        if away_s := self._outage.lasts(time.monotonic()):
            log.warning(
                "%s: no connection for %.0f s (%s); trying again", self._address.shown, away_s, reason
            )

    def _bear(self, code: int, reason: str) -> None:
        """Go on for a while with a server that lets this side in no more."""
        now = time.monotonic()
        self._refused_at = self._refused_at or now
        is_passing = refusals.passes(code) or now - self._refused_at < _REFUSED_S
        self._warn_or_fail(code, f"refuses {self.who}: {reason}", is_passing=is_passing)

    def _tell(self, reason: str | None, code: int) -> None:
        with contextlib.suppress(queue.Full):  # only the first outcome matters
            self._outcome.put_nowait((reason, code))

    def _warn_or_fail(self, code: int, what: str, *, is_passing: bool) -> None:
        text = f"{self._address.shown} {what}"
        if is_passing:
            self._warn(code, text)
        else:
            self._fail(text)

    def _warn(self, code: int, text: str) -> None:
        """Warn once a minute of the same."""
        now = time.monotonic()
        if now - self._told_at.get(code, -_TELL_EVERY_S) >= _TELL_EVERY_S:
            self._told_at[code] = now
            log.warning("%s", text)

    def _fail(self, text: str) -> None:
        self.is_stopping = True
        self._hooks.on_failure(text)
        self._leave()

    def _look_for_another(self, lasted_s: float, *, is_told: bool) -> None:
        """Stay away for a moment if somebody else may have this client id, and stop if somebody has."""
        evictions, party = self._evictions, self._hooks.party
        look_s = evictions.look_s(lasted_s=lasted_s, moved_bytes=self._moved_bytes, is_told=is_told)
        if not look_s or self._hooks.will is None:
            return
        shown, name = self._address.shown, self._client_id
        if self._look(look_s):
            self._fail(f"{shown}: the session of {name} was taken over: {party.taken}")
        elif is_told or evictions.num_in_row > 2:
            why = (
                "another client took over" if is_told else f"the server hung up {evictions.num_in_row} times"
            )
            log.warning("%s: %s as %s; perhaps %s; or %s", shown, why, name, party.taken, party.denied)
