"""The tables of a ledger, and how a database of an earlier format becomes one of this."""

import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from fleetune.broker.jobs.settings import Settings, differences
from fleetune.broker.store.costs import COLUMNS
from fleetune.broker.store.earlier import absent_in, as_begun, kept_settings, text_of, told
from fleetune.broker.store.marks import SCHEMA as MARKS
from fleetune.broker.store.mask_notes import SCHEMA as MASK_NOTES
from fleetune.broker.store.settling import SCHEMA as SETTLED
from fleetune.broker.tasks import REASON_CHARS_MAX, Plan, Task
from fleetune.device_runtime.contracts.fields import Count, TaskId, Word
from fleetune.device_runtime.contracts.wire import default_task_id
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.prepared import prepared

log = logging.getLogger(__name__)

FORMAT = 5
"""3: tasks say why, and after how many outcomes, they were chosen; declined tasks are kept. 4: plans of traffic, what is
noted of an update, and bytes by device, direction and kind. 5: of versions that are settled a line stays."""
TASK = "task_id, tasks.round, position, tasks.device, tasks.version, seed, works.work, tasks.reason, plan"
"""Columns of ``tasks JOIN works ON tasks.work = works.number`` that :func:`task_of` takes."""
_SCHEMA = """
CREATE TABLE job (format INTEGER, settings TEXT, finished REAL);
CREATE TABLE costs (round INTEGER PRIMARY KEY, bytes_down INTEGER, bytes_up INTEGER, bytes_sent INTEGER,
                    bytes_received INTEGER, seconds REAL);
"""
_SCHEMA_2 = """
CREATE TABLE versions (version INTEGER PRIMARY KEY, round INTEGER NOT NULL, sha256 TEXT NOT NULL, state TEXT NOT NULL);
CREATE TABLE tasks (task_id TEXT PRIMARY KEY, round INTEGER NOT NULL, position INTEGER NOT NULL, device TEXT NOT NULL,
                    version INTEGER NOT NULL, seed INTEGER NOT NULL, work INTEGER NOT NULL REFERENCES works,
                    reason TEXT NOT NULL DEFAULT '', outcomes INTEGER NOT NULL DEFAULT -1, plan TEXT, UNIQUE (round, position));
CREATE TABLE declines (number INTEGER PRIMARY KEY, task_id TEXT UNIQUE NOT NULL REFERENCES tasks, updates INTEGER NOT NULL,
                       cause TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE works (number INTEGER PRIMARY KEY, work TEXT UNIQUE NOT NULL);
CREATE TABLE updates (number INTEGER PRIMARY KEY, task_id TEXT UNIQUE NOT NULL REFERENCES tasks, digest TEXT NOT NULL,
                      num_samples INTEGER NOT NULL, stats TEXT NOT NULL, file TEXT NOT NULL, made INTEGER,
                      noted TEXT NOT NULL DEFAULT '{}');
CREATE INDEX updates_by_version ON updates (made);
CREATE TABLE evaluations (version INTEGER, device TEXT, task_id TEXT NOT NULL, loss REAL, accuracy REAL, num_samples INTEGER,
                          PRIMARY KEY (version, device));
"""
_INDEXES = (
    "CREATE INDEX IF NOT EXISTS versions_by_content ON versions (sha256)",
    "CREATE INDEX IF NOT EXISTS tasks_by_device ON tasks (device, round)",
)
"""What is asked for in every round is found at once, however many rounds there were; ledgers of earlier releases get them too."""
_CARRIED = f"""
CREATE TABLE carried (round INTEGER, device TEXT, {", ".join(f"{name} INTEGER NOT NULL" for name in COLUMNS)},
                      PRIMARY KEY (round, device));
"""
_SCHEMA_2 += _CARRIED
_SCHEMA_5 = (
    MARKS,
    MASK_NOTES,
    "CREATE TABLE IF NOT EXISTS starts (number INTEGER PRIMARY KEY, at REAL NOT NULL)",
    *SETTLED,
    *_INDEXES,
)
"""What ledgers of earlier formats may have, or not."""
_FORMAT_1_AWAY = (
    "ALTER TABLE versions RENAME TO old_versions",
    "ALTER TABLE updates RENAME TO old_updates",
    "ALTER TABLE evaluations RENAME TO old_evaluations",
)
_FORMAT_1_OVER = (
    "INSERT INTO versions SELECT version, version, sha256, memory FROM old_versions",
    """INSERT INTO updates SELECT NULL, 'train-' || round || '-' || device, digest, num_samples, stats_of(loss),
       printf('%05d-%s.bin', round, device), CASE WHEN round <= (SELECT max(version) FROM versions) THEN round END, '{}'
       FROM old_updates ORDER BY round, rowid""",
    """INSERT INTO evaluations SELECT version, device, 'evaluate-' || version || '-' || device, loss, accuracy, num_samples
       FROM old_evaluations""",
    "DROP TABLE old_versions",
    "DROP TABLE old_updates",
    "DROP TABLE old_evaluations",
    "DROP TABLE asked",
)
_FORMAT_2_OVER = (
    "ALTER TABLE tasks ADD COLUMN reason TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE tasks ADD COLUMN outcomes INTEGER NOT NULL DEFAULT -1",
    """CREATE TABLE declines (number INTEGER PRIMARY KEY, task_id TEXT UNIQUE NOT NULL REFERENCES tasks, updates INTEGER NOT NULL,
       cause TEXT NOT NULL, reason TEXT NOT NULL)""",
)
_FORMAT_3_OVER = (
    "ALTER TABLE tasks ADD COLUMN plan TEXT",
    "ALTER TABLE updates ADD COLUMN noted TEXT NOT NULL DEFAULT '{}'",
    _CARRIED,
)
_OVER = {2: (*_FORMAT_2_OVER, *_FORMAT_3_OVER), 3: _FORMAT_3_OVER, 4: ()}
"""By format, what is to be done to it before the tables of this one are made."""
_IS_THIS = f"UPDATE job SET format = {FORMAT}"
_NUM_OUTCOMES = (
    "(SELECT coalesce(max(number), 0) FROM updates) + (SELECT coalesce(max(number), 0) FROM declines)"
)
"""Of a job that chooses nothing is ever taken out of either."""


class Prepared(NamedTuple):
    """What a job goes on by."""

    settings: Settings
    """As asked for, but for what the job began without."""
    is_earlier: bool
    """Whether an earlier release wrote the ledger until now."""
    said: str
    """What stays off, in a line; empty if nothing does."""


def prepare(sql: sqlite3.Connection, settings: Settings, path: Path) -> Prepared:
    """Make the tables of a new ledger, or check those of an old one, after bringing them to this format.

    Raises:
        ConfigError: it is another job's.
        StateError: it is of a format that this version does not read.
        MsgspecError: its settings are damaged.
    """
    text = msgspec.json.encode(settings).decode()
    if not sql.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        sql.executescript(f"BEGIN; {_SCHEMA} {_SCHEMA_2} {'; '.join(_SCHEMA_5)}; COMMIT;")
    with sql:
        sql.execute("INSERT INTO job SELECT ?, ?, NULL WHERE NOT EXISTS (SELECT * FROM job)", (FORMAT, text))
    found, theirs = sql.execute("SELECT format, settings FROM job").fetchone()
    if found not in range(1, FORMAT + 1):
        raise StateError(
            f"{path}: format {found}; this version reads 1 to {FORMAT}: use the fleetune that wrote it"
        )
    kept, has_begun = kept_settings(theirs), _has_begun(sql, found)
    absent = absent_in(theirs) if has_begun else ()
    settings = as_begun(settings, absent)
    if has_begun and (changed := differences(settings, kept)):
        advice = "give the same settings to resume it, or another folder"
        raise ConfigError(f"{path.parent}: holds another job ({'; '.join(changed)}); {advice}")
    if found == 1:
        _upgrade(sql, kept, path)
    if found in _OVER:
        _upgrade_over(sql, _OVER[found])
    if not has_begun:
        _begin_anew(sql, text)
    elif settings != kept:
        _be_patient(sql, settings, text_of(settings, absent))
    return Prepared(settings, has_begun and found < FORMAT, told(settings, absent))


def _has_begun(sql: sqlite3.Connection, format: int) -> bool:
    """Whether anything hangs on the settings: without a version no device was ever asked, and they may all differ."""
    return format == 1 or sql.execute("SELECT EXISTS (SELECT * FROM versions)").fetchone()[0] == 1


def _begin_anew(sql: sqlite3.Connection, text: str) -> None:
    with sql:
        sql.execute("UPDATE job SET settings = ?", (text,))


def _be_patient(sql: sqlite3.Connection, settings: Settings, text: str) -> None:
    """Take other rounds than before: a job that was finished goes on if it has more to do."""
    with sql:
        sql.execute("UPDATE job SET settings = ?", (text,))
        sql.execute(
            "UPDATE job SET finished = NULL WHERE ? > (SELECT coalesce(max(round), 0) FROM versions)",
            (settings.rounds,),
        )


def add_tasks(sql: sqlite3.Connection, tasks: Iterable[Task]) -> None:
    """Insert tasks; works that differ in their seeds alone are kept once. The caller commits."""
    for task in tasks:
        work = msgspec.json.encode(msgspec.structs.replace(task.work, seed=0)).decode()
        sql.execute("INSERT OR IGNORE INTO works VALUES (NULL, ?)", (work,))
        place = (task.task_id, task.round, task.position, task.device_id, task.version, task.work.seed)
        plan = None if task.plan is None else msgspec.json.encode(task.plan).decode()
        row = (*place, task.reason, plan, work)
        sql.execute(
            f"INSERT INTO tasks SELECT ?, ?, ?, ?, ?, ?, number, ?, {_NUM_OUTCOMES}, ? FROM works WHERE work = ?",
            row,
        )


def add_decline(sql: sqlite3.Connection, task_id: str, cause: str, reason: str) -> None:
    """Insert a declined task, unless it is there. The caller commits."""
    query = "INSERT OR IGNORE INTO declines SELECT NULL, ?, coalesce(max(number), 0), ?, ? FROM updates"
    sql.execute(query, (task_id, cause, reason))


_Why = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]
_Row = tuple[TaskId, Count, Count, Word, Count, Annotated[int, msgspec.Meta(ge=0)], str, _Why, str | None]


def task_of(row: Iterable[object]) -> Task:
    """Return the task of the columns :data:`TASK`; its role is to train: evaluations are not recorded before they are offered.

    Raises:
        MsgspecError: a column is not what was written.
    """
    task_id, number, position, device, version, seed, work, reason, plan = msgspec.convert(
        tuple(row), prepared(_Row)
    )
    return Task(
        task_id=task_id,
        device_id=device,
        role="train",
        round=number,
        version=version,
        position=position,
        work=parse_work(work, seed),
        reason=reason,
        plan=None if plan is None else msgspec.json.decode(plan, type=prepared(Plan)),
    )


def parse_work(text: str, seed: int) -> LocalWork:
    """Read a recorded work; MsgspecError if it is damaged."""
    return msgspec.structs.replace(msgspec.json.decode(text, type=prepared(LocalWork)), seed=seed)


def _upgrade_over(sql: sqlite3.Connection, statements: Iterable[str]) -> None:
    """Bring a format from 2 on to this one, in one transaction: what it did not keep stays unknown."""
    with sql:
        sql.execute("BEGIN IMMEDIATE")
        for statement in (*statements, *_SCHEMA_5, _IS_THIS):
            sql.execute(statement)


def _upgrade(sql: sqlite3.Connection, settings: Settings, path: Path) -> None:
    """Bring format 1, of release 0.1.0, to this one, in one transaction."""
    for old in (path.parent / "versions").glob("*.memory.safetensors"):
        old.rename(old.with_name(old.name.replace(".memory.", ".state.")))
    with sql:
        sql.execute("BEGIN IMMEDIATE")
        asked = sql.execute("SELECT round, position, device FROM asked ORDER BY round, position").fetchall()
        for statement in (*_FORMAT_1_AWAY, *_SCHEMA_2.split(";")[:-1]):
            sql.execute(statement)
        add_tasks(sql, (_task_of_1(settings, *row) for row in asked))
        sql.create_function("stats_of", 1, lambda loss: "{}" if loss is None else json.dumps({"loss": loss}))
        for statement in (*_FORMAT_1_OVER, *_SCHEMA_5, _IS_THIS):
            sql.execute(statement)
    log.warning(
        "%s: format 1 brought to %d; an open round goes on with the devices and seeds that it has, "
        "later rounds draw theirs anew and not as release 0.1.0 would have",
        path,
        FORMAT,
    )


def _task_of_1(settings: Settings, number: int, position: int, device: str) -> Task:
    """The task that release 0.1.0 gave a device; its seed is that release's, whatever is drawn today."""
    seed = settings.seed + (number - 1) * 2**20 + position
    work = msgspec.structs.replace(settings.work, seed=seed, rounds_before=number - 1)
    return Task(
        task_id=default_task_id("train", number, device),
        device_id=device,
        role="train",
        round=number,
        version=number - 1,
        position=position,
        work=work,
    )
