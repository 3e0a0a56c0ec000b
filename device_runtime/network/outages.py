"""Tells when the MQTT server is away and when it is back: paho reconnects by itself, and says nothing."""

import logging
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class _Standing(Protocol):
    @property
    def connected(self) -> bool: ...

    @property
    def connections(self) -> int: ...


class Outages:
    """One line when a connection is lost, one when it stands again."""

    def __init__(self, link: _Standing, shown: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a connection that stands; ``shown`` is the server's address without a login."""
        self._link, self._shown, self._clock = link, shown, clock
        self._lost_at: float | None = None
        self._connections = link.connections

    def look(self) -> None:
        """Look at the connection; call it now and then."""
        is_other, self._connections = (
            self._link.connections != self._connections,
            self._link.connections,
        )
        if self._lost_at is None and not self._link.connected:
            self._lost_at = self._clock()
            log.warning("%s: the MQTT server is away; everything goes on when it is back", self._shown)
        elif self._lost_at is not None and self._link.connected:
            log.warning(
                "%s: the MQTT server is back after %.0f s", self._shown, self._clock() - self._lost_at
            )
            self._lost_at = None
        elif is_other:
            log.warning("%s: the MQTT server was away, and is back", self._shown)
