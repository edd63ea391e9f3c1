"""Do the tables of operations say what the record says? Reads only."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

_ON_RECORD = {
    "operation": ("operation-not-listed", "SELECT 1 FROM operation WHERE id = ? AND record = ? AND requester = ?"),
    "approval": ("approval-not-listed", "SELECT 1 FROM approval WHERE operation = ? AND record = ?"),
    "intent": ("spending-not-listed", "SELECT 1 FROM spending WHERE operation = ? AND retry_of = ? AND use = ?"),
}
_REFUSED = (
    "EXISTS (SELECT 1 FROM approval JOIN record ON idx = approval.record WHERE approval.operation = operation.id"
    " AND json_valid(CAST(leaf AS TEXT)) AND json_extract(CAST(leaf AS TEXT), '$.body.verdict') = 'refuse')"
)
_SPENT = "EXISTS (SELECT 1 FROM spending WHERE spending.operation = operation.id AND spending.use = operation.use)"
_IN_TABLES = (
    (
        "operation-not-on-record",
        "SELECT operation.record, id FROM operation LEFT JOIN record ON idx = operation.record WHERE kind IS NOT 'operation'",
    ),
    (
        "approval-not-on-record",
        "SELECT approval.record, operation FROM approval LEFT JOIN record ON idx = approval.record WHERE kind IS NOT 'approval'",
    ),
    (
        "spending-not-on-record",
        (
            "SELECT -1, spending.use FROM spending LEFT JOIN record ON record.use = spending.use AND record.use <> '' AND kind = 'intent'"
            " WHERE idx IS NULL"
        ),
    ),
    (
        "operation-end",
        f"SELECT operation.record, id FROM operation WHERE (ended = 'redeemed') <> {_SPENT} OR (ended = 'refused') <> {_REFUSED}",  # noqa: S608
    ),
)


def has_tables(db: sqlite3.Connection) -> bool:
    """Whether the database has come to the format that has them."""
    return db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'spending'").fetchone() is not None


def rules_of_record(db: sqlite3.Connection, index: int, record: dict[str, Any]) -> Iterator[str]:
    """What the tables do not say of a record that is about an operation."""
    operation, kind = record.get("operation_id"), record.get("kind")
    if not isinstance(operation, str) or not operation or kind not in _ON_RECORD:
        return
    rule, statement = _ON_RECORD[str(kind)]
    trail = record.get("trail")
    requester = trail.get("id", "") if isinstance(trail, dict) else ""
    values = {
        "operation": (operation, index, str(requester)),
        "approval": (operation, index),
        "intent": (operation, str(record.get("retry_of")), str(record.get("use"))),
    }
    if db.execute(statement, values[str(kind)]).fetchone() is None:
        yield rule


def rules_of_tables(db: sqlite3.Connection) -> Iterator[tuple[int, str, str]]:
    """What the tables say and the record does not: the index of a record, or -1; a rule; which operation or use."""
    for rule, statement in _IN_TABLES:
        yield from ((index, rule, detail) for index, detail in db.execute(statement))
