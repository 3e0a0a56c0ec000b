"""Says in a line what a job waits for, when that changes."""

import logging
from collections.abc import Callable

from fleetune.broker.rounds.federation import Federation
from fleetune.broker.tasks import listed

log = logging.getLogger(__name__)

_NAMED = 16
"""So many devices are named; of more every hundredth is told."""
_EVERY = 100


class Narrator:
    """No message takes longer for more devices."""

    def __init__(self, federation: Federation, on_note: Callable[[str], object]) -> None:
        self._federation, self._on_note = federation, on_note
        self._told = ""

    def tell(self, now: float) -> None:
        """Tell what is waited for, if it is not what was told last."""
        rounds = self._federation.rounds
        text = self._gathering(now) or rounds.declined_by() or self._evaluating() or rounds.early_end
        if text and text != self._told:
            log.info("%s", text)
            self._on_note(text)
        self._told = text or self._told

    def _gathering(self, now: float) -> str:
        """Devices that the next round lacks; empty if a round is open, or no more are to come."""
        rounds = self._federation.rounds
        if rounds.open_round or rounds.is_done:
            return ""
        here, wanted = rounds.quorum.num_fit(rounds.closed + 1), rounds.wanted(now)
        if here >= wanted or (here > _NAMED and here % _EVERY):
            return ""
        names = f": {listed(rounds.roster.present)}" if 0 < here <= _NAMED else ""
        return f"round {rounds.closed + 1}: {here} of {wanted} devices here{names}; waiting for {wanted - here} more"

    def _evaluating(self) -> str:
        rounds, evaluations = self._federation.rounds, self._federation.evaluations
        if self._federation.finished or not rounds.is_done:
            return ""
        number = evaluations.num_silent(self._federation.version)
        if number > _NAMED and number % _EVERY:
            return self._told
        silent = evaluations.silent(self._federation.version)
        return (
            f"{rounds.closed} rounds are done; waiting for the evaluation of {listed(silent)}"
            if silent
            else ""
        )
