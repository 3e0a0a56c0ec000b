"""What a job has come to so far, in its folder: a job that is stopped leaves what it learned, the adapter and its history."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from fleetune.broker.rounds.quarantine import Quarantine
from fleetune.broker.service.choices import choices
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import Row, Spending, row, rows
from fleetune.broker.store.settling import stride
from fleetune.broker.store.store import AFTERWARDS, BEFORE, ByKind, in_all
from fleetune.broker.tasks import Mark
from fleetune.device_runtime.arrays import parse_arrays, write_atomically
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import MANIFEST, Artifact
from fleetune.device_runtime.contracts.run_file import (
    ADAPTER,
    CHECKPOINT,
    CHOICES,
    LEDGER,
    RUN,
    TRAFFIC,
    write_run,
)
from fleetune.device_runtime.contracts.scores import score_of
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import doing

HISTORY_SHARE = 256
"""``run.json`` is behind by at most one part in so many of its rounds while a job runs."""
_FOREIGN = (RUN, ADAPTER, CHECKPOINT, MANIFEST)
"""What other commands leave in a folder: ``train`` the first three, ``export`` the last."""
_MARKS_MAX = 200


class AggregateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a job came to; every figure counts the restarts in."""

    rounds: int
    """Done."""
    finished: bool
    """Whether they are all; ``run.json`` is written after each of them."""
    accuracy: float | None
    """Of the last version, over the evaluating devices, as the figures below; None without one, or of another problem."""
    loss: float | None
    bytes_down: int
    """Payload of all chunks sent to devices (training and evaluating), repetitions included."""
    bytes_up: int
    """Payload of all chunks received from devices, repetitions included."""
    link_bytes_sent: int
    """Payload of all MQTT messages sent by the aggregator."""
    link_bytes_received: int
    down: ByKind
    """What ``link_bytes_sent`` is made of; by device and round in ``traffic.jsonl``."""
    up: ByKind
    """What ``link_bytes_received`` is made of."""
    wall_s: float
    adapter: str
    """PEFT folder."""
    left_out: dict[str, int]
    """Devices that are not asked for a while, and the last round of it."""
    marks: list[Mark]
    """What was noted of devices, the newest last; all of it is in the ledger."""
    history: list[Row]
    dropped: int = 0
    """Messages that came faster than they could be taken, or were too large, since this start; they are asked for again."""
    exact_match: float | None = None
    r2: float | None = None
    perplexity: float | None = None
    epsilon: float | None = None
    """Spent, of the device that was asked most often; None without differential privacy."""


class CarriedOf(msgspec.Struct, frozen=True, kw_only=True):
    """What was carried of one device, or for several at once (``freight.SHARED``), in one round.

    The round is -1 for the time after the last, -2 for all that are settled.
    """

    round: int
    device: str
    down: ByKind
    up: ByKind


class Result:
    """``adapter/`` for PEFT and ``run.json``, each file whole or as it was before."""

    def __init__(
        self,
        ledger: Ledger,
        artifact: Artifact,
        arguments: dict[str, Any],
        *,
        chooses: bool = False,
        strikes: int = 0,
        spending: Spending | None = None,
        keep_rounds: int = 0,
    ) -> None:
        """Prepare.

        Args:
            ledger: the job's.
            artifact: that it trains.
            arguments: of the call, for ``run.json``.
            chooses: whether a configurator or planner chooses: that has a file.
            strikes: as in :class:`fleetune.broker.jobs.settings.Job`.
            spending: of a job with noise.
            keep_rounds: as in :class:`fleetune.broker.jobs.patience.Patience`: the history has no more rows than twice that.
        """
        self._chooses, self._strikes, self._spending = chooses, strikes, spending
        self._score = score_of(artifact.manifest)
        self._ledger, self._artifact, self._arguments = ledger, artifact, arguments
        self.dropped = 0
        """Messages that the link has dropped until now."""
        self._told: dict[int, msgspec.Raw] = {}
        """Rows that are complete, as JSON, by version."""
        self._next, self._keep_rounds = 0, keep_rounds
        self._kept = (0, 0)
        self._adapter_of = 0
        self._due = 0

    def tell(self, told: Row) -> None:
        """Take a row that is complete, and keep it; they come in order, from the first on. StateError as ``keep``."""
        self._told[told.round] = _as_json(told)
        self._next = told.round + 1
        if 0 < 2 * self._keep_rounds < len(self._told) - 1:
            self._thin(told.round - self._keep_rounds)
        self.keep()

    def keep(self, *, whole: bool = False) -> None:
        """Write what is new since the last time; nothing before the first round is closed.

        The adapter is written after every round. So is ``run.json``, until its history is so long that writing it would make
        rounds ever dearer: then once for each 1/HISTORY_SHARE that the history grows by, and where the ``whole`` is asked for.

        Raises:
            StateError: the folder cannot be written, or the ledger not be read.
        """
        newest = self._ledger.newest
        if newest <= 0 or self._kept == (newest, self._next):
            return
        if newest < self._due and not whole:
            self._write_adapter(newest)
            return
        rest = rows(self._ledger, first=self._next, spending=self._spending, score=self._score)
        self._write([*self._told.values(), *map(_as_json, rest)], rest[-1] if rest else self._row(newest))
        self._due = newest + newest // HISTORY_SHARE

    def conclude(self) -> AggregateReport:
        """Write everything afresh: a report may have come after its row was told. StateError as ``keep``."""
        if self._chooses:
            self._write_choices()
        self._write_traffic()
        history = rows(self._ledger, spending=self._spending, score=self._score)
        return self._write(history, history[-1])

    def _thin(self, settled: int) -> None:
        """Drop rows as the ledger does."""
        every = stride(settled, self._keep_rounds)
        self._told = {v: told for v, told in self._told.items() if v > settled or v % every == 0}

    def _row(self, version: int) -> Row:
        return row(self._ledger, version, spending=self._spending, score=self._score)

    def _write_choices(self) -> None:
        """One JSON object a line, for each device in each round."""
        path = self._ledger.folder / CHOICES
        with doing("written", path):
            write_atomically(path, msgspec.json.Encoder().encode_lines(list(choices(self._ledger))))

    def _write_traffic(self) -> None:
        """One JSON object a line, for each device in each round; without a name what was for all."""
        path, ledger = self._ledger.folder / TRAFFIC, self._ledger
        numbers = [BEFORE, *range(ledger.newest + 1), AFTERWARDS]
        lines = [
            CarriedOf(round=number, device=device, down=one.down, up=one.up)
            for number in numbers
            for device, one in ledger.carried(number).items()
        ]
        with doing("written", path):
            write_atomically(path, msgspec.json.Encoder().encode_lines(lines))

    def _write(self, history: Sequence[Row | msgspec.Raw], last: Row) -> AggregateReport:
        newest = self._ledger.newest
        report = _report(self._ledger, history, last, self._strikes, self.dropped)
        self._write_adapter(newest)
        write_run(self._ledger.folder, self._artifact, self._arguments, report)
        self._kept = newest, self._next
        return report

    def _write_adapter(self, newest: int) -> None:
        if newest != self._adapter_of:
            learned = parse_arrays(self._ledger.version(newest))
            save_peft(self._ledger.folder / ADAPTER, self._artifact.manifest, learned)
            self._adapter_of = newest


def _as_json(told: Row) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(told))


def check_folder(out: Path) -> None:
    """Raise ConfigError if what lies in ``out`` was left there by another command: it would be written over."""
    found = [name for name in _FOREIGN if (out / name).exists()]
    if found and not (out / LEDGER).exists():
        raise ConfigError(
            f"{out}: {', '.join(found)} lie there and no ledger of an aggregator: another command's; give another --out"
        )


def _report(
    ledger: Ledger, history: Sequence[Row | msgspec.Raw], last: Row, strikes: int, dropped: int
) -> AggregateReport:
    marks = ledger.marks()
    cost, carried = ledger.cost(), in_all(ledger.carried())
    return AggregateReport(
        rounds=last.round,
        finished=ledger.finished,
        accuracy=last.accuracy,
        exact_match=last.exact_match,
        r2=last.r2,
        perplexity=last.perplexity,
        loss=last.loss,
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        link_bytes_sent=cost.bytes_sent,
        link_bytes_received=cost.bytes_received,
        down=carried.down,
        up=carried.up,
        wall_s=cost.seconds,
        adapter=str(ledger.folder / ADAPTER),
        left_out=Quarantine(strikes, marks).until(last.round + 1),
        marks=marks[-_MARKS_MAX:],
        history=cast("list[Row]", history),
        dropped=dropped,
        epsilon=last.epsilon,
    )
