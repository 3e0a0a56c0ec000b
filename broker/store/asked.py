"""Who was asked for what in a job, and what came of it: read from its ledger's database."""

import sqlite3
from collections.abc import Iterator

import msgspec

from fleetune.broker.store.ledger_schema import TASK, parse_work, task_of
from fleetune.broker.store.store import Decided
from fleetune.broker.tasks import Noted, Outcome
from fleetune.device_runtime.contracts.fields import Count
from fleetune.device_runtime.prepared import prepared

TASKS = "tasks JOIN works ON tasks.work = works.number"
WITH_TASKS = "updates JOIN tasks USING (task_id) JOIN works ON tasks.work = works.number"
_OUTCOMES = """
SELECT device, seed, works.work, stats, cause, round, num_samples, noted FROM (
    SELECT task_id, stats, NULL AS cause, number AS after, 0 AS place, num_samples, noted FROM updates
    UNION ALL SELECT task_id, '{}', cause, updates, number, 0, '{}' FROM declines
) JOIN tasks USING (task_id) JOIN works ON tasks.work = works.number ORDER BY after, place
"""
_DECIDED = f"""
SELECT outcomes, stats, declines.reason, {TASK} FROM {TASKS} LEFT JOIN updates USING (task_id)
LEFT JOIN declines USING (task_id) ORDER BY tasks.round, position
"""
_TURNS = """
SELECT device, sum(turns) FROM (
    SELECT device, turns FROM settled_devices WHERE coalesce(:round, 1) > 0
    UNION ALL SELECT device, count(DISTINCT round) FROM tasks LEFT JOIN declines USING (task_id)
              WHERE declines.number IS NULL AND round <= coalesce(:round, round) GROUP BY device
) GROUP BY device HAVING sum(turns) > 0
"""
_LAST = """
SELECT digest FROM tasks JOIN updates USING (task_id) WHERE tasks.device = ?
ORDER BY tasks.round DESC, updates.number DESC LIMIT 1
"""
_LAST_SETTLED = "SELECT digest FROM settled_devices WHERE device = ? AND digest <> ''"


def outcomes(sql: sqlite3.Connection) -> Iterator[Outcome]:
    """Every accepted update and declined task that is kept, in the order in which they came."""
    for device, seed, work, stats, cause, number, num_samples, noted in sql.execute(_OUTCOMES):
        of = parse_work(work, seed)
        yield Outcome(device, of, stats_of(stats), cause, number, num_samples, noted_of(noted))


def decided(sql: sqlite3.Connection) -> Iterator[Decided]:
    """Every training task that is kept in the order in which they were chosen, and what came of it."""
    for count, stats, declined, *task in sql.execute(_DECIDED):
        known, why = msgspec.convert((count, declined), prepared(tuple[int, str | None]))
        yield Decided(task_of(task), known, None if stats is None else stats_of(stats), why)


def turns(sql: sqlite3.Connection, round_number: int | None) -> dict[str, int]:
    """In how many rounds, up to 0 or one that is not settled, each device was asked to train and did not decline."""
    return msgspec.convert(dict(sql.execute(_TURNS, {"round": round_number})), prepared(dict[str, Count]))


def last_update(sql: sqlite3.Connection, device_id: str) -> str | None:
    """Digest of the last accepted update of a device; None if it has none."""
    for query in (_LAST, _LAST_SETTLED):
        if found := sql.execute(query, (device_id,)).fetchone():
            return str(found[0])
    return None


def stats_of(text: str) -> dict[str, float]:
    """Read the statistics of an update; MsgspecError if they are damaged."""
    return msgspec.json.decode(text, type=prepared(dict[str, float]))


def noted_of(text: str) -> Noted:
    """Read what is noted of an update; MsgspecError if it is damaged."""
    return msgspec.json.decode(text, type=prepared(Noted))
