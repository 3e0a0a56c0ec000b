"""Opens the database of a ledger for one aggregator at a time, and looks at all of it once."""

import sqlite3
from pathlib import Path
from typing import TextIO

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.store.damage import DAMAGES, check_damage, damaged
from fleetune.broker.store.ledger_schema import Prepared, prepare
from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.files import doing, locked, private_file

_LOCK = "ledger.lock"
_PRAGMAS = ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL")
"""The first is for new ledgers: one of an earlier release uses pages anew that are free, and does not become smaller."""


def taken(folder: Path) -> TextIO:
    """Take the folder for this process, and return what holds it until it is closed.

    Raises:
        ConfigError: another aggregator has it.
        StateError: it cannot be written.
    """
    with doing("written", folder):
        try:
            return locked(folder / _LOCK, mode=0o644)
        except BlockingIOError as exc:
            raise ConfigError(
                f"{folder}: another aggregator is at work here; give each its own folder"
            ) from exc


def opened(path: Path, settings: Settings) -> tuple[sqlite3.Connection, Prepared]:
    """Open or begin a ledger; one of an earlier format is brought to this one. And what the job goes on by.

    Raises:
        ConfigError: it is another job's, or another aggregator's at this moment.
        StateError: it is damaged, or of another format.
        OSError: it cannot be written.
    """
    try:
        private_file(path)
        sql = sqlite3.connect(path, timeout=5.0)
    except sqlite3.Error as exc:
        raise StateError(f"{path}: cannot be opened: {exc}") from exc
    try:
        for pragma in _PRAGMAS:
            sql.execute(f"PRAGMA {pragma}")
        prepared = prepare(sql, settings, path)
        check_damage(sql)
    except DAMAGES as exc:
        sql.close()
        if "locked" in str(exc):
            raise ConfigError(
                f"{path.parent}: another aggregator, of release 0.1.0, is at work here"
            ) from exc
        raise damaged(path, exc) from exc
    except BaseException:
        sql.close()
        raise
    return sql, prepared
