"""Listens to a job over MQTT, and says Look while somebody wants to know."""

import secrets
import threading
import time
from math import inf

from fleetune.device_runtime.contracts.wire import Look, aggregator_topic, encode
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.hooks import Party
from fleetune.device_runtime.network.link import Link
from fleetune.toolkit.watching.fleet import Fleet
from fleetune.toolkit.watching.state import FleetState

LOOK_S = 5.0
"""Between two Looks."""
CATCH_UP_S = 1.0
"""Between two Looks while rounds are missing."""
WANTED_S = 90.0
"""Nobody has asked for so long: nobody looks. Longer than a scrape interval, so that one keeps it up."""


class Listener:
    """One job; one thread calls ``open``, ``turn`` and ``close``, and any number ``state``."""

    def __init__(self, mqtt: str, job: str, reach: Reach) -> None:
        """Prepare; ConfigError for an address or files that cannot be used."""
        self._fleet, self._job, self._reach = Fleet(job), job, reach
        self._lock = threading.Lock()
        self._wanted_at = self._looked_at = -inf
        self._link = Link.reaching(
            mqtt,
            reach,
            client_id=f"fleetune-watch-{job}-{secrets.token_hex(4)}",
            topics=self._fleet.topics,
            party=Party(
                denied=f"who watches logs in as the aggregator does: it must be let read fleetune/v1/{job}/#, and write "
                f"{aggregator_topic(job, 'look')}"
            ),
        )

    @property
    def shown(self) -> str:
        """The server's address, without a login."""
        return self._link.address.shown

    def open(self) -> None:
        """Connect. TransportError if nobody is there, or the login is refused."""
        self._link.open(self._reach.timeout_s)

    def close(self) -> None:
        """Leave."""
        self._link.close()

    def turn(self, wait_s: float) -> None:
        """Take what comes within a time, and look if somebody wants to know. TransportError as of the link."""
        now = time.monotonic()
        if self._is_due(now):
            self._looked_at = now
            with self._lock:
                look = Look(rounds_from=self._fleet.rounds_from)
            send(self._link, aggregator_topic(self._job, "look"), encode(look))
        if message := self._link.receive(wait_s):
            with self._lock:
                self._fleet.take(*message, time.monotonic())

    def state(self) -> FleetState:
        """Return the fleet as it stands; somebody wants to know, from now on for a while."""
        now = time.monotonic()
        self._wanted_at = now
        with self._lock:
            return self._fleet.state(now)

    def is_complete(self, since: float) -> bool:
        """Whether the aggregator has answered, and every device online told what it is at, since then."""
        with self._lock:
            return self._fleet.is_viewed and not self._fleet.num_untold(since)

    def _is_due(self, now: float) -> bool:
        if now - self._wanted_at > WANTED_S:
            return False
        with self._lock:
            lacks = self._fleet.lacks_rounds
        return now - self._looked_at >= (CATCH_UP_S if lacks else LOOK_S)
