"""The files of a simulation: ``rounds.jsonl``, ``devices.jsonl`` and ``run.json``, written and read.

A figure of a round is of that round alone; whoever wants sums adds them up. Energy is a proxy: watts of the profile times
virtual seconds. What is not known, or not finite, is null.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from fleetune.broker.store.store import ByKind
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.run_file import RUN, write_run
from fleetune.device_runtime.errors import DataError, one_line
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.prepared import prepared

DEVICES = "devices.jsonl"
R = TypeVar("R", bound=msgspec.Struct)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What one device was asked for in a round, and what came of it."""

    device: str
    profile: str
    policy: str
    """In a few words: ``suffix 0.5``."""
    reason: str = ""
    """Why the configurator chose it."""
    outcome: str = "counted"
    """``counted``, or in a word why not: ``late``, ``dropped-out``, ``declined``."""
    seconds: float = 0.0
    """Virtual, from the offer to the update's arrival."""
    compute_s: float = 0.0
    """Virtual, in this round: its steps, measuring, sums for the head, and what it had left of late work."""
    peak_mb: float = 0.0
    """Expected peak of its training, in 10^6 bytes."""
    gain: float | None = None
    """Accuracy on its own held-out samples after, less before."""


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A round; 0 is version 0, before any training. ``accuracy`` and ``loss`` are those of the version that it made."""

    round: int
    time_s: float
    """Virtual, since the start, when it closed."""
    accuracy: float | None = None
    """Null if that version was not evaluated."""
    loss: float | None = None
    personal_accuracy: float | None = None
    """Mean of its devices' own models, each on what it holds back; null where none keeps a model and holds samples back."""
    devices: int = 0
    """Whose updates counted."""
    bytes_up: int = 0
    bytes_down: int = 0
    skipped: int = 0
    """Of those devices, how many said that their last update counts again."""
    up: ByKind = ByKind()
    """All that devices sent, with what is around their updates."""
    down: ByKind = ByKind()
    compute_s: float = 0.0
    """Virtual, the sum over the devices, work that was lost included."""
    energy_j: float = 0.0
    peak_mb: float = 0.0
    """The highest of a device."""
    peak_mb_mean: float = 0.0
    """The mean over its devices."""
    epsilon: float | None = None
    """Spent with this version and all before, of the device that was asked most often; null without noise."""
    wall_s: float = 0.0
    """What simulating it took on this machine: the only figure that differs from run to run."""
    choices: tuple[Choice, ...] = ()


class DeviceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A device of the fleet, and what it did in all rounds together."""

    device: str
    profile: str
    samples: int
    classes: int
    """Different ones among its samples."""
    rounds: int = 0
    """In which its update counted."""
    compute_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    up: ByKind = ByKind()
    """As the aggregator has received; ``bytes_up`` is what the device sent, also what was lost."""
    down: ByKind = ByKind()
    energy_j: float = 0.0
    peak_mb: float = 0.0


class SimulationReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a simulation came to; the last thing that is written."""

    name: str
    """Of the arm."""
    seed: int
    rounds: int
    """Done."""
    finished: bool
    """Whether they are all."""
    devices: int
    """In the fleet."""
    accuracy: float | None = None
    """Of the last version that was evaluated."""
    loss: float | None = None
    time_s: float = 0.0
    """Virtual."""
    compute_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    up: ByKind = ByKind()
    down: ByKind = ByKind()
    energy_j: float = 0.0
    peak_mb: float = 0.0
    personal_accuracy: float | None = None
    """Of the last round in which a device told one."""
    skipped: int = 0
    """Of the updates that counted, how many were no new ones."""
    epsilon: float | None = None
    """Spent, of the device that was asked most often; null without differential privacy."""
    device_rounds: int = 0
    wall_s: float = 0.0
    """On this machine, over all starts."""
    adapter: str = ""
    """PEFT folder."""


class _RunOnly(msgspec.Struct):
    report: SimulationReport
    arguments: dict[str, Any] = {}


def append(path: Path, record: msgspec.Struct) -> None:
    """Add a line to a file and see it on disk; StateError if it cannot be.

    A line that a kill has cut off is ended by the reader's rule: what has no newline is no record. Call :func:`mend` first.
    """
    with doing("written", path), path.open("ab") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, records: Iterable[msgspec.Struct]) -> None:
    """Write a file whole, or leave the one before; StateError if it cannot be."""
    with doing("written", path):
        write_atomically(path, b"".join(map(_line, records)))


def mend(path: Path, kind: type[R]) -> list[R]:
    """Cut off what a kill left of a last line, and return the records before it; none if there is no file."""
    if not path.exists():
        return []
    records = read_lines(path, kind)
    write_lines(path, records)
    return records


def read_lines(path: Path, kind: type[R]) -> list[R]:
    """Read records; a last line without its newline was being written and is left out.

    Raises:
        DataError: no such file, or a line that is none of ``kind``; its number is named.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror}") from exc
    return [_record(path, number, line, kind) for number, line in enumerate(lines, 1)]


def read_report(folder: Path) -> SimulationReport:
    """Read what a simulation came to, from its folder.

    Raises:
        DataError: no simulation there, or one that was stopped before it had written anything.
    """
    path = folder / RUN
    try:
        return msgspec.json.decode(path.read_bytes(), type=prepared(_RunOnly)).report
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        said = getattr(exc, "strerror", None) or exc
        raise DataError(f"{path}: no run of fleetune simulate: {said}") from exc


def write_report(folder: Path, artifact: Artifact, config: msgspec.Struct, report: SimulationReport) -> None:
    """Write ``run.json`` as the other commands have it, so that ``fleetune merge`` takes the folder; StateError if not."""
    write_run(folder, artifact, msgspec.to_builtins(config, enc_hook=str), report)


def finite(value: float | None) -> float | None:
    """Return a figure that JSON can hold; None for NaN and the infinities."""
    return value if value is not None and math.isfinite(value) else None


def _line(record: msgspec.Struct) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def _record(path: Path, number: int, line: bytes, kind: type[R]) -> R:
    try:
        return msgspec.json.decode(line, type=prepared(kind))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise DataError(f"{path}, line {number}: {one_line(exc)}") from exc
