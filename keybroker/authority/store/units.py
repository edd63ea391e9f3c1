"""The units that limits have taken: one row for each, or for several that leave their window together. Called inside a transaction.

Uses that share a transaction mostly share counters, too: the newest row of each is remembered until the transaction ends, and no longer.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

_NEWEST = "SELECT seq, units, until_us FROM limit_unit WHERE counter = ? ORDER BY seq DESC LIMIT 1"
_HOLDING = "SELECT seq, units, until_us FROM limit_unit WHERE counter = ? AND seq >= ? ORDER BY seq LIMIT 1"
_FIRST_IN = "SELECT seq - units FROM limit_unit WHERE counter = ? AND until_us >= ? ORDER BY seq LIMIT 1"
_ADD = "INSERT INTO limit_unit VALUES (?, ?, 1, ?)"
_EXTEND = "UPDATE limit_unit SET seq = seq + 1, units = units + 1, until_us = ? WHERE counter = ? AND seq = ?"
_FORGET = "DELETE FROM limit_unit WHERE counter = ? AND seq <= ?"
_PAGE = "SELECT counter, seq, until_us FROM limit_unit WHERE (counter, seq) > (?, ?) ORDER BY counter, seq LIMIT ?"


@dataclass(frozen=True, slots=True)
class UnitRow:
    """Units `seq - units + 1` to `seq` of a counter. The last of them leaves its window at `until_us`."""

    seq: int
    units: int
    until_us: int


class UnitTable:
    """The rows of all counters. A counter is named by a digest, and is there as long as it has rows."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection
        self._swept: tuple[bytes, int] = (b"", 0)
        self._newest: dict[bytes, UnitRow | None] = {}

    def begin(self) -> None:
        """A transaction begins: what the one before has seen, or has taken and not kept, counts no more."""
        self._newest.clear()

    def newest(self, counter: bytes) -> UnitRow | None:
        """The row of the unit that was taken last."""
        if counter not in self._newest:
            row = self._db.execute(_NEWEST, (counter,)).fetchone()
            self._newest[counter] = UnitRow(*row) if row else None
        return self._newest[counter]

    def holding(self, counter: bytes, seq: int) -> UnitRow | None:
        """The row of unit `seq`, or the next one if that unit has left its window and was forgotten."""
        row = self._db.execute(_HOLDING, (counter, seq)).fetchone()
        return UnitRow(*row) if row else None

    def in_window(self, counter: bytes, now_us: int) -> int:
        """How many units have not left the window. Looks through the whole counter."""
        first = self._db.execute(_FIRST_IN, (counter, now_us)).fetchone()
        newest = self.newest(counter)
        return newest.seq - first[0] if newest and first else 0

    def add(self, counter: bytes, seq: int, until_us: int) -> None:
        """Unit `seq` is taken, and gets a row of its own."""
        self._db.execute(_ADD, (counter, seq, until_us))
        self._newest[counter] = UnitRow(seq, 1, until_us)

    def extend(self, counter: bytes, newest: UnitRow, until_us: int) -> None:
        """One more unit is taken, and joins the newest row, whose units leave when this one does."""
        self._db.execute(_EXTEND, (until_us, counter, newest.seq))
        self._newest[counter] = UnitRow(newest.seq + 1, newest.units + 1, until_us)

    def forget(self, counter: bytes, seq: int) -> None:
        """The units up to `seq` have left their window."""
        self._db.execute(_FORGET, (counter, seq))

    def sweep(self, now_us: int, rows: int) -> None:
        """Forget what has left its window, in the next so many rows: callers that do not come again leave theirs behind."""
        self._newest.clear()
        page = self._db.execute(_PAGE, (*self._swept, rows)).fetchall()
        self._db.executemany(
            "DELETE FROM limit_unit WHERE counter = ? AND seq = ?", [(counter, seq) for counter, seq, until_us in page if until_us < now_us]
        )
        self._swept = (page[-1][0], page[-1][1]) if len(page) == rows else (b"", 0)
