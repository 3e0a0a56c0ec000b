"""Who is not asked for a while: a pure function of the job's marks, in their order.

A device with ``strikes`` rounds that count against it, of WINDOW, is not asked for TERM rounds; then it begins anew. What the
operator pardons is forgotten. Marks of a round tell from the second round after it on: the next one may open before they are
kept, and a restart must choose the same devices.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fleetune.broker.tasks import PARDONED, REFUSED, STRIKES, Mark

WINDOW = 20
TERM = 20
_TELLS_AFTER = 2


class _Term(NamedTuple):
    first: int
    last: int


class Quarantine:
    """Of one job."""

    def __init__(self, strikes: int, marks: Iterable[Mark] = ()) -> None:
        """Begin, or resume with ``marks``; with 0 ``strikes`` nobody is ever left out."""
        self._most = strikes
        self._rounds: dict[str, list[int]] = {}
        """Rounds that count against a device."""
        self._terms: dict[str, _Term] = {}
        self._refused: dict[int, set[str]] = {}
        for mark in marks:
            self.add(mark)

    def add(self, mark: Mark) -> str:
        """Learn of a mark that is kept; return in words what comes of it, empty for nothing."""
        before = self._terms.get(mark.device)
        self._learn(mark)
        term = self._terms.get(mark.device)
        return f"not asked in rounds {term.first} to {term.last}" if term and term != before else ""

    def holds(self, device_id: str, number: int) -> bool:
        """Whether a device is not to be asked in a round."""
        term = self._terms.get(device_id)
        return term is not None and term.first <= number <= term.last

    def until(self, number: int) -> dict[str, int]:
        """Devices that are not asked from a round on, by name, and the last round that they are not asked in."""
        return {d: term.last for d, term in sorted(self._terms.items()) if term.last >= number}

    def refused(self, number: int) -> frozenset[str]:
        """Devices whose update of a round could not be one."""
        return frozenset(self._refused.get(number, ()))

    def _learn(self, mark: Mark) -> None:
        if mark.kind == PARDONED:
            self._rounds.pop(mark.device, None)
            self._terms.pop(mark.device, None)
        elif mark.kind in STRIKES and self._most:
            self._strike(mark.device, mark.round)
        if mark.kind == REFUSED:
            self._refused = {r: d for r, d in self._refused.items() if r >= mark.round}
            self._refused.setdefault(mark.round, set()).add(mark.device)

    def _strike(self, device: str, number: int) -> None:
        rounds = [one for one in self._rounds.get(device, ()) if number - WINDOW < one < number]
        self._rounds[device] = [*rounds, number]
        if len(self._rounds[device]) < self._most:
            return
        self._rounds[device] = []
        first, last = number + _TELLS_AFTER, number + _TELLS_AFTER + TERM - 1
        before = self._terms.get(device)
        is_longer = before is not None and before.last >= first - 1
        self._terms[device] = _Term(before.first if is_longer and before else first, last)
