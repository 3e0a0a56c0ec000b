"""Tells the rows of a job, each once and in order, when they are complete."""

from collections.abc import Callable

from fleetune.broker.rounds.federation import Federation
from fleetune.broker.store.rows import Row, row
from fleetune.broker.store.store import Store


class Reporter:
    """After a restart it begins with the first row again."""

    def __init__(self, store: Store, federation: Federation, on_row: Callable[[Row], object]) -> None:
        self._store, self._federation, self._on_row = store, federation, on_row
        self._next = 0

    def tell(self) -> None:
        """Tell the rows that are complete and were not told yet."""
        while self._next <= self._federation.version and self._is_complete(self._next):
            self._on_row(row(self._store, self._next))
            self._next += 1

    def _is_complete(self, version: int) -> bool:
        if self._store.finished:
            return True
        # Evaluating devices may come a little later than the others: the first row waits for them for a round.
        federation, reports = self._federation, self._federation.evaluations
        has_time = federation.version > 0 or (federation.round > 0 and reports.has_reports(version))
        return has_time and reports.is_complete(version)
