"""What a job has come to so far, in its folder: a job that is stopped leaves what it learned, the adapter and its history."""

from pathlib import Path
from typing import Any

import msgspec

from fleetune.broker.service.choices import choices
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import Row, Spending, row, rows
from fleetune.broker.store.store import AFTERWARDS, ByKind, Carried, in_all
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
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import doing

_FOREIGN = (RUN, ADAPTER, CHECKPOINT, MANIFEST)
"""What other commands leave in a folder: ``train`` the first three, ``export`` the last."""


class AggregateReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a job came to; every figure counts the restarts in."""

    rounds: int
    """Done."""
    finished: bool
    """Whether they are all; ``run.json`` is written after each of them."""
    accuracy: float | None
    """Of the last version, over the evaluating devices; None without one."""
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
    history: list[Row]
    epsilon: float | None = None
    """Spent, of the device that was asked most often; None without differential privacy."""


class CarriedOf(msgspec.Struct, frozen=True, kw_only=True):
    """What was carried of one device in one round, -1 for the time after the last."""

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
        spending: Spending | None = None,
    ) -> None:
        """Prepare; ``arguments`` of the call are for ``run.json``. What a configurator or planner ``chooses`` has a file."""
        self._chooses, self._spending = chooses, spending
        self._ledger, self._artifact, self._arguments = ledger, artifact, arguments
        self._told: list[Row] = []
        self._kept = (0, 0)

    def tell(self, told: Row) -> None:
        """Take a row that is complete, and keep it; they come in order, from the first on. StateError as ``keep``."""
        self._told.append(told)
        self.keep()

    def keep(self) -> None:
        """Write what is new since the last time; nothing before the first round is closed.

        Raises:
            StateError: the folder cannot be written, or the ledger not be read.
        """
        newest = self._ledger.newest
        if newest > 0 and self._kept != (newest, len(self._told)):
            rest = range(len(self._told), newest + 1)
            more = (row(self._ledger, version, spending=self._spending) for version in rest)
            self._write([*self._told, *more])

    def conclude(self) -> AggregateReport:
        """Write everything afresh: a report may have come after its row was told. StateError as ``keep``."""
        if self._chooses:
            self._write_choices()
        self._write_traffic()
        return self._write(rows(self._ledger, spending=self._spending))

    def _write_choices(self) -> None:
        """One JSON object a line, for each device in each round."""
        path = self._ledger.folder / CHOICES
        with doing("written", path):
            write_atomically(path, msgspec.json.Encoder().encode_lines(list(choices(self._ledger))))

    def _write_traffic(self) -> None:
        """One JSON object a line, for each device in each round; without a name what was for all."""
        path, ledger = self._ledger.folder / TRAFFIC, self._ledger
        numbers = [*range(ledger.newest + 1), AFTERWARDS]
        lines = [
            CarriedOf(round=number, device=device, down=one.down, up=one.up)
            for number in numbers
            for device, one in ledger.carried(number).items()
        ]
        with doing("written", path):
            write_atomically(path, msgspec.json.Encoder().encode_lines(lines))

    def _write(self, history: list[Row]) -> AggregateReport:
        newest, folder = len(history) - 1, self._ledger.folder
        report = _report(self._ledger, history)
        if newest != self._kept[0]:
            learned = parse_arrays(self._ledger.version(newest))
            save_peft(folder / ADAPTER, self._artifact.manifest, learned)
        write_run(folder, self._artifact, self._arguments, report)
        self._kept = newest, len(self._told)
        return report


def check_folder(out: Path) -> None:
    """Raise ConfigError if what lies in ``out`` was left there by another command: it would be written over."""
    found = [name for name in _FOREIGN if (out / name).exists()]
    if found and not (out / LEDGER).exists():
        raise ConfigError(
            f"{out}: {', '.join(found)} lie there and no ledger of an aggregator: another command's; give another --out"
        )


def _report(ledger: Ledger, history: list[Row]) -> AggregateReport:
    cost, carried, last = ledger.cost(), _carried(ledger, history), history[-1]
    return AggregateReport(
        rounds=last.round,
        finished=ledger.finished,
        accuracy=last.accuracy,
        loss=last.loss,
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        link_bytes_sent=cost.bytes_sent,
        link_bytes_received=cost.bytes_received,
        down=carried.down,
        up=carried.up,
        wall_s=cost.seconds,
        adapter=str(ledger.folder / ADAPTER),
        history=history,
        epsilon=last.epsilon,
    )


def _carried(ledger: Ledger, history: list[Row]) -> Carried:
    """What was carried in the whole job: as its rows have it, in the open round, and after the last."""
    told = [Carried(down=row.down, up=row.up) for row in history]
    rest = (in_all(ledger.carried(number)) for number in (history[-1].round + 1, AFTERWARDS))
    return sum([*told, *rest], Carried())
