"""The tables of operations that wait for a quorum: they say where on record to look, and which operation has ended.

What was asked for and what was approved is on record, and the approvals are signed; whoever changes these tables can hide an operation or
end it, but approve none. That an operation is used once stands in `spending`: an intent names its operation under a primary key.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

from keybroker.authority.operations import End

TABLES = """
CREATE TABLE operation (
    id          TEXT PRIMARY KEY,
    requester   TEXT NOT NULL,
    target_kind TEXT NOT NULL,        -- with target_id: whom it concerns, to find out who may see it
    target_id   TEXT NOT NULL,
    record      INTEGER NOT NULL,     -- what was asked for
    expires_us  INTEGER NOT NULL,
    changes     INTEGER NOT NULL,     -- how often something has happened to it
    ended       TEXT NOT NULL,        -- '', 'redeemed' or 'refused'
    use         TEXT NOT NULL         -- the use that redeemed it, the newest if it was tried again; '' if there is none
) STRICT, WITHOUT ROWID;
CREATE INDEX operation_requester ON operation (requester, id);
CREATE INDEX operation_live ON operation (requester, expires_us) WHERE ended = '';
CREATE TABLE approval (
    record    INTEGER PRIMARY KEY,    -- the statement, and who gave it
    operation TEXT NOT NULL REFERENCES operation
) STRICT;
CREATE INDEX approval_operation ON approval (operation);
CREATE TABLE spending (
    operation TEXT NOT NULL REFERENCES operation,
    retry_of  TEXT NOT NULL,          -- '' for the first use of an operation; a use that released nothing can be tried again once
    use       TEXT NOT NULL UNIQUE,
    PRIMARY KEY (operation, retry_of)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class OperationRow:
    """One operation, as far as the table knows."""

    id: str
    requester: str
    target_kind: str
    target_id: str
    record: int
    expires_us: int
    changes: int
    end: End
    use: str


class OperationTables:
    """The writer's side. Everything is called inside a transaction of the store's."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def live(self, requester: str, now_us: int) -> int:
        """How many operations of one requester have neither ended nor expired."""
        statement = "SELECT count(*) FROM operation WHERE requester = ? AND ended = '' AND expires_us > ?"
        found: int = self._db.execute(statement, (requester, now_us)).fetchone()[0]
        return found

    def find(self, operation: str) -> OperationRow | None:
        """One operation, or None."""
        return row_of(self._db, operation)

    def add(self, row: OperationRow) -> None:
        """An operation has been asked for."""
        self._db.execute(
            "INSERT INTO operation VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.id,
                row.requester,
                row.target_kind,
                row.target_id,
                row.record,
                row.expires_us,
                row.changes,
                row.end.value,
                row.use,
            ),
        )

    def approved(self, operation: str, record: int) -> None:
        """An approval or a refusal is on record."""
        self._db.execute("INSERT INTO approval VALUES (?, ?)", (record, operation))
        self._db.execute("UPDATE operation SET changes = changes + 1 WHERE id = ?", (operation,))

    def approvals(self, operation: str) -> int:
        """How many approvals and refusals are on record."""
        found: int = self._db.execute("SELECT count(*) FROM approval WHERE operation = ?", (operation,)).fetchone()[0]
        return found

    def refuse(self, operation: str) -> None:
        """The operation has ended."""
        self._db.execute("UPDATE operation SET ended = 'refused' WHERE id = ?", (operation,))

    def spend(self, operation: str, retry_of: str, use: str) -> None:
        """A use names the operation. Fails where one does already."""
        self._db.execute("INSERT INTO spending VALUES (?, ?, ?)", (operation, retry_of, use))
        self._db.execute("UPDATE operation SET ended = 'redeemed', use = ?, changes = changes + 1 WHERE id = ?", (use, operation))

    def may_be_tried_again(self, operation: str, use: str) -> bool:
        """Whether this use named the operation, has ended, released nothing, and has not been tried again."""
        statement = (
            "SELECT 1 FROM spending AS spent JOIN record ON record.use = spent.use AND record.use <> '' AND record.kind = 'outcome'"
            " WHERE spent.operation = ? AND spent.use = ? AND record.outcome <> 'signed'"
            " AND NOT EXISTS (SELECT 1 FROM spending WHERE operation = spent.operation AND retry_of = spent.use)"
        )
        return self._db.execute(statement, (operation, use)).fetchone() is not None


def row_of(db: sqlite3.Connection, operation: str) -> OperationRow | None:
    """One operation, or None."""
    row = db.execute("SELECT * FROM operation WHERE id = ?", (operation,)).fetchone()
    return made_of(row) if row else None


def made_of(row: tuple[Any, ...]) -> OperationRow:
    """A row of `SELECT * FROM operation`."""
    return OperationRow(row[0], row[1], row[2], row[3], row[4], row[5], row[6], End(row[7]), row[8])
