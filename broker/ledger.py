"""The aggregator's memory on disk: SQLite and files, so that what was acknowledged survives a SIGKILL.

A file is written whole and synced before the row that names it, so a row never names what is not there.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import msgspec

from fleetune.broker.job import Settings, differences
from fleetune.broker.rounds import Past
from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.wire import Report, UpdateReady
from fleetune.device_runtime.errors import ConfigError, StateError, WireError

FILE = "ledger.sqlite"
AFTERWARDS = -1
"""Stands for a round where the time after the last one is meant."""
_FORMAT = 1
_SCHEMA = """
CREATE TABLE job (format INTEGER, settings TEXT, finished REAL);
CREATE TABLE versions (version INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, memory TEXT NOT NULL);
CREATE TABLE costs (round INTEGER PRIMARY KEY, bytes_down INTEGER, bytes_up INTEGER, bytes_sent INTEGER,
                    bytes_received INTEGER, seconds REAL);
CREATE TABLE asked (round INTEGER, position INTEGER, device TEXT, PRIMARY KEY (round, device));
CREATE TABLE updates (round INTEGER, device TEXT, digest TEXT, num_samples INTEGER, loss REAL,
                      PRIMARY KEY (round, device));
CREATE TABLE evaluations (version INTEGER, device TEXT, loss REAL, accuracy REAL, num_samples INTEGER,
                          PRIMARY KEY (version, device));
"""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What something has cost."""

    bytes_down: int = 0
    """Payload of the chunks sent to devices, repetitions included."""
    bytes_up: int = 0
    """Payload of the chunks received from devices, repetitions included."""
    bytes_sent: int = 0
    """What the aggregator's link sent: all messages, with their topics."""
    bytes_received: int = 0
    seconds: float = 0.0


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a round; round 0 is the time before the first, with the adapter as exported.

    ``loss`` and ``accuracy`` are those of the version that the round made, over the evaluating devices by
    their samples; None until one has reported. ``bytes_down`` and ``bytes_up`` are as in :class:`Cost`.
    """

    round: int
    devices: int
    loss: float | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    """Mean of the devices' last local losses, by their samples."""
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


class Accepted(NamedTuple):
    """An accepted update of the open round."""

    device_id: str
    num_samples: int
    payload: bytes


class Ledger:
    """The ledger of one job in one folder; one aggregator at a time."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Open or begin.

        Raises:
            ConfigError: the folder is another job's, or another aggregator's at this moment.
            StateError: the ledger is damaged, or of another format.
        """
        self.folder = folder
        for part in (folder / "versions", folder / "updates"):
            part.mkdir(parents=True, exist_ok=True)
        try:
            self._sql = _connect(folder / FILE)
            _check(self._sql, settings, folder)
        except sqlite3.OperationalError as exc:
            raise ConfigError(f"{folder / FILE}: {exc}; is another aggregator at work here?") from exc
        except sqlite3.DatabaseError as exc:
            raise StateError(f"{folder / FILE}: not a ledger, or damaged: {exc}") from exc

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the folder back."""
        self._sql.close()

    def past(self) -> Past:
        """Where the job stands."""
        version = self._one("SELECT coalesce(max(version), 0) FROM versions")
        asked = self._sql.execute(
            "SELECT device FROM asked WHERE round = ? ORDER BY position", (version + 1,)
        )
        updates = self._sql.execute("SELECT round, device, digest FROM updates")
        reports = self._sql.execute("SELECT version, device FROM evaluations")
        return Past(
            version=version,
            asked=tuple(device for (device,) in asked),
            accepted={(number, device): digest for number, device, digest in updates},
            reported=frozenset((v, d) for v, d in reports),
            finished=self._one("SELECT finished IS NOT NULL FROM job") == 1,
        )

    def add_version(self, version: int, content: bytes, *, memory: bytes = b"") -> None:
        """Keep the adapter of a version and the strategy's memory; this closes round ``version``."""
        row = (version, sha256(content).hexdigest(), sha256(memory).hexdigest() if memory else "")
        with self._durably():
            write_atomically(self._version_path(version), content)
            if memory:
                write_atomically(self._memory_path(version), memory)
            self._sql.execute("INSERT INTO versions VALUES (?, ?, ?)", row)
        self._sweep(version)

    def version(self, version: int) -> bytes:
        """Content of the adapter file of a version.

        Raises:
            StateError: it is not what was written.
        """
        digest = self._one("SELECT sha256 FROM versions WHERE version = ?", version)
        return _read_checked(self._version_path(version), digest)

    def version_with(self, digest: str) -> int | None:
        """The version whose adapter file has this SHA-256; None if there is none."""
        found: int | None = self._one("SELECT max(version) FROM versions WHERE sha256 = ?", digest)
        return found

    def memory(self, version: int) -> bytes:
        """The strategy's memory after a version; empty if it has none."""
        digest = self._one("SELECT memory FROM versions WHERE version = ?", version)
        return _read_checked(self._memory_path(version), digest) if digest else b""

    def has_version(self, version: int) -> bool:
        """Whether a version is kept."""
        return bool(self._one("SELECT count(*) FROM versions WHERE version = ?", version))

    def ask(self, round_number: int, devices: tuple[str, ...]) -> None:
        """Keep who belongs to a round."""
        first = self._one("SELECT count(*) FROM asked WHERE round = ?", round_number)
        rows = [(round_number, first + i, device) for i, device in enumerate(devices)]
        with self._durably():
            self._sql.executemany("INSERT INTO asked VALUES (?, ?, ?)", rows)

    def accept(self, update: UpdateReady, payload: bytes) -> None:
        """Keep an update; once this returns it may be acknowledged."""
        known = self._one(
            "SELECT digest FROM updates WHERE round = ? AND device = ?", update.round, update.device_id
        )
        if known:
            raise WireError(f"device {update.device_id!r} has an update in round {update.round} already")
        row = (
            update.round,
            update.device_id,
            update.payload.sha256,
            update.num_samples,
            update.stats.get("loss"),
        )
        with self._durably():
            write_atomically(self._update_path(update.round, update.device_id), payload)
            self._sql.execute("INSERT INTO updates VALUES (?, ?, ?, ?, ?)", row)

    def accepted(self, round_number: int) -> Iterator[Accepted]:
        """The accepted updates of the open round, one in memory at a time."""
        query = "SELECT device, digest, num_samples FROM updates WHERE round = ? ORDER BY device"
        for device, digest, num_samples in self._sql.execute(query, (round_number,)).fetchall():
            yield Accepted(
                device, num_samples, _read_checked(self._update_path(round_number, device), digest)
            )

    def report(self, report: Report) -> bool:
        """Keep an evaluation; False if there was one already."""
        row = (report.version, report.device_id, report.loss, report.accuracy, report.num_samples)
        with self._durably():
            return (
                self._sql.execute("INSERT OR IGNORE INTO evaluations VALUES (?, ?, ?, ?, ?)", row).rowcount
                == 1
            )

    def spend(self, round_number: int, cost: Cost) -> None:
        """Add to what a round, or AFTERWARDS, has cost."""
        values = msgspec.structs.astuple(cost)
        with self._durably():
            self._sql.execute("INSERT OR IGNORE INTO costs VALUES (?, 0, 0, 0, 0, 0)", (round_number,))
            sums = ", ".join(f"{name} = {name} + ?" for name in Cost.__struct_fields__)
            self._sql.execute(f"UPDATE costs SET {sums} WHERE round = ?", (*values, round_number))

    def cost(self, round_number: int | None = None) -> Cost:
        """What a round has cost, or the whole job."""
        where = "" if round_number is None else f" WHERE round = {round_number:d}"
        names = Cost.__struct_fields__
        sums = ", ".join(f"coalesce(sum({name}), 0)" for name in names)
        found = self._sql.execute(f"SELECT {sums} FROM costs{where}").fetchone()
        return Cost(**dict(zip(names, found, strict=True)))

    def finish(self) -> None:
        """Keep that the job is over."""
        with self._durably():
            self._sql.execute("UPDATE job SET finished = coalesce(finished, ?)", (time.time(),))

    def rows(self) -> list[Row]:
        """One row for each version, 0 first."""
        return [
            self.row(version)
            for (version,) in self._sql.execute("SELECT version FROM versions ORDER BY version")
        ]

    def row(self, version: int) -> Row:
        """What is known of the round that made a version."""
        cost = self.cost(version)
        return Row(
            round=version,
            devices=self._one("SELECT count(*) FROM updates WHERE round = ?", version),
            loss=self._mean("loss", "evaluations WHERE version = ?", version),
            accuracy=self._mean("accuracy", "evaluations WHERE version = ?", version),
            train_loss=self._mean("loss", "updates WHERE loss IS NOT NULL AND round = ?", version),
            bytes_down=cost.bytes_down,
            bytes_up=cost.bytes_up,
            seconds=cost.seconds,
        )

    @contextmanager
    def _durably(self) -> Iterator[None]:
        try:
            with self._sql:
                yield
        except (sqlite3.Error, OSError) as exc:
            raise StateError(f"{self.folder}: cannot write the ledger: {exc}") from exc

    def _mean(self, column: str, source: str, number: int) -> float | None:
        query = f"SELECT sum({column} * num_samples) / sum(num_samples) FROM {source}"
        mean: float | None = self._one(query, number)
        return mean

    def _one(self, query: str, *values: object) -> Any:
        found = self._sql.execute(query, values).fetchone()
        return found[0] if found else None

    def _version_path(self, version: int) -> Path:
        return self.folder / "versions" / f"{version:05d}.safetensors"

    def _memory_path(self, version: int) -> Path:
        return self.folder / "versions" / f"{version:05d}.memory.safetensors"

    def _update_path(self, round_number: int, device_id: str) -> Path:
        return self.folder / "updates" / f"{round_number:05d}-{device_id}.bin"

    def _sweep(self, version: int) -> None:
        for path in (self.folder / "updates").glob("*.bin"):
            if int(path.name.split("-", 1)[0]) <= version:
                path.unlink()


def _connect(path: Path) -> sqlite3.Connection:
    sql = sqlite3.connect(path, timeout=1.0)
    for pragma in ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL"):
        sql.execute(f"PRAGMA {pragma}")
    return sql


def _check(sql: sqlite3.Connection, settings: Settings, folder: Path) -> None:
    text = msgspec.json.encode(settings).decode()
    if not sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        with sql:
            sql.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    with sql:
        sql.execute("INSERT INTO job SELECT ?, ?, NULL WHERE NOT EXISTS (SELECT * FROM job)", (_FORMAT, text))
    found, theirs = sql.execute("SELECT format, settings FROM job").fetchone()
    if found != _FORMAT:
        raise StateError(f"{folder / FILE}: format {found}; this version reads {_FORMAT}")
    if changed := differences(settings, _parse(theirs, folder)):
        advice = "give the same settings to resume it, or another folder"
        raise ConfigError(f"{folder}: holds another job ({'; '.join(changed)}); {advice}")


def _parse(text: str, folder: Path) -> Settings:
    try:
        return msgspec.json.decode(text, type=Settings)
    except msgspec.MsgspecError as exc:
        raise StateError(f"{folder / FILE}: settings cannot be read: {exc}") from exc


def _read_checked(path: Path, digest: str | None) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise StateError(f"{path}: named in the ledger, but cannot be read: {exc}") from exc
    found = sha256(content).hexdigest()
    if found != digest:
        raise StateError(f"{path}: SHA-256 {found[:12]}, the ledger says {str(digest)[:12]}")
    return content
