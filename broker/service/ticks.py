"""When a service that takes messages looks whether anything else is due."""

from math import inf

from fleetune.broker.service.service import Service

LOOK_S = 0.05
"""While messages wait it is looked so often whether anything else is due; what they bring about is done with them."""


class Ticks:
    """Ticks a service when it is due; while messages wait it is looked whether it is every so often, not after each."""

    def __init__(self, service: Service) -> None:
        self._service, self._looks_at = service, -inf

    def turn(self, now: float, *, has_more: bool) -> None:
        """Tick, if it is due; ``has_more``: a message can be taken at once."""
        if has_more and now < self._looks_at:
            return
        self._looks_at = now + LOOK_S
        if self._service.due_at(now) <= now:
            self._service.tick(now)
