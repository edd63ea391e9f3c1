"""The end of the log, looked at before a broker goes on writing there: after a crash, that is where damage would be.

What it costs does not depend on how long the log is. `keybroker audit check` looks at the whole of it.
"""

from __future__ import annotations

import sqlite3

from keybroker.audit import leaf as leaves
from keybroker.audit.chain import is_canonical
from keybroker.authority.store.row import NEWEST, StoredRow
from keybroker.errors import StoreError

RECORDS = 1_000  # about as many as one write-ahead log holds


def require_whole(db: sqlite3.Connection) -> None:
    """Check the last records: bytes, hashes, positions, times, trails, columns.

    Raises:
        StoreError: names the first record that is wrong.
        sqlite3.Error: it cannot be read.
    """
    rows = [StoredRow(*row) for row in db.execute(NEWEST, (RECORDS,))]
    before: StoredRow | None = None
    for row in rows:
        fault = _fault(db, row, before)
        if fault:
            msg = (
                f"the record is damaged at index {row.index} ({fault}); `keybroker audit check` says what else is,"
                " restore the state directory from a copy"
            )
            raise StoreError(msg)
        before = row


def _fault(db: sqlite3.Connection, row: StoredRow, before: StoredRow | None) -> str:
    """The first rule that a record breaks; empty if none."""
    if not row.is_readable:
        return "cannot-be-read"
    try:
        record = leaves.decode(row.leaf)
    except ValueError:
        return "not-json"
    if not is_canonical(row.leaf, record):
        return "not-canonical"
    broken = next(row.rules_broken(record, leaves.leaf_hash(row.leaf)), "")
    return broken or _misplaced(db, row, before, record["trail"].get("previous", ""))


def _misplaced(db: sqlite3.Connection, row: StoredRow, before: StoredRow | None, previous: str) -> str:
    if before is not None and row.index != before.index + 1:
        return "missing-record"
    if before is not None and row.time_us < before.time_us:
        return "time-goes-back"
    return "" if _follows_in_trail(db, row, previous) else "trail-previous"


def _follows_in_trail(db: sqlite3.Connection, row: StoredRow, previous: str) -> bool:
    if not row.trail_index:
        return bool(previous == "")
    found = db.execute(
        "SELECT hash FROM record WHERE trail = (SELECT id FROM trail WHERE spiffe_id = ?) AND trail_index = ?",
        (row.trail, row.trail_index - 1),
    ).fetchone()
    return found is not None and found[0].hex() == previous
