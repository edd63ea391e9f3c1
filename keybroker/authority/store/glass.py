"""Break-glass in the store, until it has been reviewed. Each function is called inside a transaction, or before there is a journal."""

from __future__ import annotations

import sqlite3

from keybroker.model.glass import BrokenGlass


def load(db: sqlite3.Connection) -> list[BrokenGlass]:
    """What has not been reviewed, oldest first."""
    return [
        BrokenGlass(*row)
        for row in db.execute("SELECT id, grant_id, reason, opened_by, person, opened_us, until_us FROM glass ORDER BY id")
    ]


def put(db: sqlite3.Connection, glass: BrokenGlass) -> None:
    """It was opened, or ends earlier than it did."""
    db.execute(
        "INSERT OR REPLACE INTO glass (id, grant_id, reason, opened_by, person, opened_us, until_us) VALUES (?,?,?,?,?,?,?)",
        (glass.id, glass.grant, glass.reason, glass.by, glass.person, glass.opened_us, glass.until_us),
    )


def remove(db: sqlite3.Connection, number: str) -> None:
    """It has been reviewed."""
    db.execute("DELETE FROM glass WHERE id = ?", (number,))
