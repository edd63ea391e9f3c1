"""Freezes in the store. Each function is called inside a transaction of the journal, or before there is one."""

from __future__ import annotations

import sqlite3

from keybroker.model.freeze import Freeze


def load(db: sqlite3.Connection) -> list[Freeze]:
    """Every freeze in force, oldest first."""
    return [Freeze(*row) for row in db.execute("SELECT id, kind, target, reason, frozen_by, since FROM freeze ORDER BY id")]


def add(db: sqlite3.Connection, freeze: Freeze) -> None:
    """A freeze is in force."""
    db.execute(
        "INSERT INTO freeze (id, kind, target, reason, frozen_by, since) VALUES (?,?,?,?,?,?)",
        (freeze.id, freeze.kind, freeze.target, freeze.reason, freeze.by, freeze.since),
    )


def remove(db: sqlite3.Connection, number: str) -> None:
    """A freeze is lifted."""
    db.execute("DELETE FROM freeze WHERE id = ?", (number,))
