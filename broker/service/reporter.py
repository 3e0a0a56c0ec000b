"""Tells the rows of a job, each once and in order, when they are complete."""

from collections.abc import Callable

from fleetune.broker.rounds.federation import Federation
from fleetune.broker.store.rows import Row, Spending, find_row
from fleetune.broker.store.store import Store
from fleetune.device_runtime.contracts.scores import ACCURACY


class Reporter:
    """After a restart it begins with the first row again; of rounds that are settled with those that are left."""

    def __init__(
        self,
        store: Store,
        federation: Federation,
        on_row: Callable[[Row], object],
        spending: Spending | None = None,
        score: str = ACCURACY,
    ) -> None:
        self._store, self._federation, self._on_row = store, federation, on_row
        self._spending, self._score = spending, score
        self._next = 0

    def tell(self) -> None:
        """Tell the rows that are complete and were not told yet."""
        while self._next <= self._federation.version and self._is_complete(self._next):
            row = find_row(self._store, self._next, spending=self._spending, score=self._score)
            if row is not None:
                self._on_row(row)
            self._next += 1

    def _is_complete(self, version: int) -> bool:
        if self._store.finished:
            return True
        # Evaluating devices may come a little later than the others, after a restart too: a row waits for them for a round.
        federation, reports = self._federation, self._federation.evaluations
        if version == federation.version:
            is_first_of_all = version == 0 and not (federation.round and reports.has_reports(version))
            return not is_first_of_all and not reports.num_silent(version)
        return reports.is_complete(version)
