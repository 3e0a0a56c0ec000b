"""The costs of a job in its ledger's database, by round."""

import sqlite3

import msgspec

from fleetune.broker.store.store import Cost

_SPEND = """
INSERT INTO costs VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (round) DO UPDATE SET
    bytes_down = bytes_down + excluded.bytes_down, bytes_up = bytes_up + excluded.bytes_up,
    bytes_sent = bytes_sent + excluded.bytes_sent, bytes_received = bytes_received + excluded.bytes_received,
    seconds = seconds + excluded.seconds
"""
_SUMS = """
SELECT coalesce(sum(bytes_down), 0), coalesce(sum(bytes_up), 0), coalesce(sum(bytes_sent), 0),
       coalesce(sum(bytes_received), 0), coalesce(sum(seconds), 0.0)
FROM costs WHERE ?1 IS NULL OR round = ?1
"""


def add_cost(sql: sqlite3.Connection, round_number: int, cost: Cost) -> None:
    """Add to what a round has cost; the caller commits."""
    sql.execute(_SPEND, (round_number, *msgspec.structs.astuple(cost)))


def total_cost(sql: sqlite3.Connection, round_number: int | None) -> Cost:
    """What a round has cost, or all of them together; ValidationError if a column is not what was written."""
    found = sql.execute(_SUMS, (round_number,)).fetchone()
    return msgspec.convert(dict(zip(Cost.__struct_fields__, found, strict=True)), Cost)
