"""The costs of a job in its ledger's database, by round."""

import sqlite3
from collections.abc import Mapping

import msgspec

from fleetune.broker.store.store import BEFORE, ByKind, Carried, Cost
from fleetune.device_runtime.prepared import prepared

_SPEND = """
INSERT INTO costs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (round) DO UPDATE SET
    bytes_down = bytes_down + excluded.bytes_down, bytes_up = bytes_up + excluded.bytes_up,
    bytes_sent = bytes_sent + excluded.bytes_sent, bytes_received = bytes_received + excluded.bytes_received,
    seconds = seconds + excluded.seconds
"""
_SUMS = """
SELECT coalesce(sum(bytes_down), 0), coalesce(sum(bytes_up), 0), coalesce(sum(bytes_sent), 0),
       coalesce(sum(bytes_received), 0), coalesce(sum(seconds), 0.0)
FROM costs
"""
_OF_ROUND = " WHERE round = ?"

_KINDS = ByKind.__struct_fields__
COLUMNS = tuple(f"{way}_{kind}" for way in Carried.__struct_fields__ for kind in _KINDS)
"""Of what was carried of a device in a round."""
_CARRY = f"""
INSERT INTO carried VALUES (?, ?, {", ".join("?" * len(COLUMNS))}) ON CONFLICT (round, device) DO UPDATE SET
    {", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS)}
"""
_CARRIED = f"""
SELECT device, {", ".join(f"sum({name})" for name in COLUMNS)} FROM carried
"""
_BY_DEVICE = " GROUP BY device ORDER BY device"


def add_cost(sql: sqlite3.Connection, round_number: int, cost: Cost) -> None:
    """Add to what a round has cost; the caller commits."""
    sql.execute(_SPEND, (round_number, *msgspec.structs.astuple(cost)))


def total_cost(sql: sqlite3.Connection, round_number: int | None) -> Cost:
    """What a round has cost, or all of them together; ValidationError if a column is not what was written."""
    found = _of(sql, _SUMS, round_number).fetchone()
    return msgspec.convert(dict(zip(Cost.__struct_fields__, found, strict=True)), prepared(Cost))


def add_carried(sql: sqlite3.Connection, round_number: int, carried: Mapping[str, Carried]) -> None:
    """Add to what was carried in a round, by device; the caller commits."""
    rows = (
        (round_number, device, *msgspec.structs.astuple(one.down), *msgspec.structs.astuple(one.up))
        for device, one in carried.items()
    )
    sql.executemany(_CARRY, rows)


def total_carried(sql: sqlite3.Connection, round_number: int | None) -> dict[str, Carried]:
    """What was carried in a round, or in all together, by device; ValidationError if a column is not what was written."""
    return {device: _carried(counts) for device, *counts in _of(sql, _CARRIED, round_number, _BY_DEVICE)}


def fold_costs(sql: sqlite3.Connection, round_number: int) -> None:
    """Add what a round has cost to what the settled ones have, under BEFORE; the caller commits."""
    add_cost(sql, BEFORE, total_cost(sql, round_number))
    add_carried(sql, BEFORE, total_carried(sql, round_number))
    for table in ("costs", "carried"):
        sql.execute(f"DELETE FROM {table} WHERE round = ?", (round_number,))


def _of(sql: sqlite3.Connection, query: str, round_number: int | None, end: str = "") -> sqlite3.Cursor:
    """Ask of one round, which its index finds at once, or of all."""
    return (
        sql.execute(query + end)
        if round_number is None
        else sql.execute(query + _OF_ROUND + end, (round_number,))
    )


def _carried(counts: list[object]) -> Carried:
    down, up = counts[: len(_KINDS)], counts[len(_KINDS) :]
    fields = {"down": dict(zip(_KINDS, down, strict=True)), "up": dict(zip(_KINDS, up, strict=True))}
    return msgspec.convert(fields, prepared(Carried))
