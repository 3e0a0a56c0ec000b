"""Says that a link has dropped messages: at once, then once a minute how many more."""

import logging
from math import inf

from fleetune.device_runtime.network.connection import Connection

log = logging.getLogger(__name__)

EVERY_S = 60.0


class Overflow:
    """Watches one link."""

    def __init__(self, link: Connection) -> None:
        self._link, self._told, self._due = link, link.dropped, -inf

    def tell(self, now: float) -> None:
        """Warn, if there is something new and it is time to."""
        if self._link.dropped == self._told or now < self._due:
            return
        number, self._told, self._due = self._link.dropped - self._told, self._link.dropped, now + EVERY_S
        log.warning(
            "%d messages were dropped: they came faster than they could be taken, or were too large; what is missing is asked "
            "for again",
            number,
        )
