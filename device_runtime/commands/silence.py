"""Says that nothing is heard of an aggregator: servers that deny a subscription in silence leave no other trace."""

import logging
from math import inf
from typing import Protocol

log = logging.getLogger(__name__)

FIRST_S, EVERY_S = 30.0, 600.0


class Hearer(Protocol):
    """What is asked of an agent."""

    @property
    def heard_at(self) -> float:
        """When the last message came; 0 for never."""

    @property
    def has_status(self) -> bool:
        """Whether the aggregator's status was heard in this life."""


class Silence:
    """Warns after 30 s without a word, or with words and no status, and every 10 minutes from then on."""

    def __init__(self, where: str, *, job: str, advice: str) -> None:
        """Prepare; ``where`` names the server, ``advice`` what it must allow."""
        self._where, self._job, self._advice = where, job, advice
        self._due = inf

    def begin(self, now: float) -> None:
        """The connection stands from now on."""
        self._due = now + FIRST_S

    @property
    def due_at(self) -> float:
        """Time at which :meth:`check` next has something to say; inf for never."""
        return self._due

    def check(self, hearer: Hearer, now: float) -> None:
        """Warn if it is time to and there is reason to; once the aggregator's status is heard there never is."""
        if now < self._due:
            return
        self._due = inf if hearer.has_status else now + EVERY_S
        if not hearer.heard_at:
            log.warning("%s", self.text("yet"))
        elif not hearer.has_status:
            topic = f"fleetune/v1/{self._job}/aggregator/status"
            log.warning(
                "%s: messages come and no status of the aggregator: may this device read %s?",
                self._where, topic,
            )  # fmt: skip

    def text(self, since: str) -> str:
        """Nothing was heard: where, and why that may be."""
        return (
            f"{self._where}: no word of an aggregator {since}: is one at work on job {self._job!r} at this server? "
            f"If so, {self._advice}"
        )
