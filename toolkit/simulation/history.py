"""Rounds that are closed: written in their order when their versions are measured, and summed up."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.store import ByKind
from fleetune.device_runtime.contracts.run_file import ROUNDS
from fleetune.device_runtime.contracts.wire import Report
from fleetune.toolkit.simulation.jobs import Done
from fleetune.toolkit.simulation.records import RoundRecord, SimulationReport, append, finite
from fleetune.toolkit.simulation.runs import Begun

EVALUATOR = "simulator"
"""Who reports measurements, in the ledger."""
_SUMMED = ("compute_s", "bytes_up", "bytes_down", "energy_j", "skipped")
_BY_KIND = ("up", "down")


class Progress(NamedTuple):
    """Where a simulation stands."""

    round: int
    rounds: int
    time_s: float
    """Virtual."""
    accuracy: float | None


class History:
    """The rounds of one simulation."""

    def __init__(
        self, folder: Path, ledger: Ledger, *, job: str, rounds: int, say: Callable[[Progress], object]
    ) -> None:
        """Begin; ``say`` is told of each round that is written."""
        self._path, self._ledger, self._job, self._rounds, self._say = (
            folder / ROUNDS,
            ledger,
            job,
            rounds,
            say,
        )
        self._pending: deque[tuple[RoundRecord, Begun | None]] = deque()
        self._totals: dict[str, float] = dict.fromkeys(_SUMMED, 0)
        self._kinds = dict.fromkeys(_BY_KIND, ByKind())
        self._peak_mb = 0.0
        self._personal: float | None = None
        self._last: RoundRecord | None = None
        self._measured: RoundRecord | None = None

    def add(self, record: RoundRecord, measuring: Begun | None) -> None:
        """A round is closed; its version is being measured, or is not to be."""
        self._pending.append((record, measuring))

    def write(self, *, all_of_them: bool) -> None:
        """Write those whose versions are measured; or wait for all."""
        while self._pending:
            record, measuring = self._pending[0]
            if measuring and not measuring.is_done and not all_of_them:
                return
            self._pending.popleft()
            self._write(record, measuring.wait().check() if measuring else None)

    def sums(self, report: SimulationReport) -> SimulationReport:
        """Fill in what the rounds came to."""
        last, measured = self._last, self._measured
        assert last is not None
        return msgspec.structs.replace(
            report,
            rounds=last.round,
            accuracy=measured.accuracy if measured else None,
            loss=measured.loss if measured else None,
            time_s=last.time_s,
            epsilon=last.epsilon,
            peak_mb=self._peak_mb,
            personal_accuracy=self._personal,
            **self._totals,
            **self._kinds,
        )

    def _write(self, record: RoundRecord, done: Done | None) -> None:
        if done:
            record = msgspec.structs.replace(record, accuracy=finite(done.accuracy), loss=finite(done.loss))
            self._ledger.report(self._told(record.round, done))
        append(self._path, record)
        self._count(msgspec.structs.replace(record, choices=()))
        self._say(Progress(record.round, self._rounds, record.time_s, record.accuracy))

    def _count(self, record: RoundRecord) -> None:
        self._last = record
        self._measured = self._measured if record.accuracy is None else record
        self._personal = self._personal if record.personal_accuracy is None else record.personal_accuracy
        self._peak_mb = max(self._peak_mb, record.peak_mb)
        for name in _SUMMED:
            self._totals[name] += getattr(record, name)
        for way in _BY_KIND:
            self._kinds[way] += getattr(record, way)

    def _told(self, number: int, done: Done) -> Report:
        return Report(
            device_id=EVALUATOR,
            job=self._job,
            task_id=f"evaluate-{number}-{EVALUATOR}",
            round=number,
            version=number,
            loss=done.loss,
            accuracy=done.accuracy,
            num_samples=done.num_samples,
        )
