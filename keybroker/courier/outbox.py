"""What is to be delivered, durably: SQLite in a directory of the courier's own. Losing it loses notices, and nothing else.

A notice is one record of the log for one hook. It waits, is tried again after pauses that grow, and is dead after `MAX_ATTEMPTS`.
What was delivered is forgotten.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keybroker.errors import StoreError

MAX_ATTEMPTS = 12
MAX_NOTICES = 100_000
_FIRST_PAUSE_S, _MAX_PAUSE_S = 2.0, 1_800.0
_MAX_WHY_CHARACTERS = 200

_SCHEMA = """
CREATE TABLE IF NOT EXISTS place (one INTEGER PRIMARY KEY CHECK (one = 1), record INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS notice (
    hook TEXT NOT NULL,
    record INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    due_us INTEGER NOT NULL,
    is_dead INTEGER NOT NULL,
    why TEXT NOT NULL,
    PRIMARY KEY (hook, record)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS due ON notice (hook, is_dead, due_us);
"""


@dataclass(frozen=True, slots=True)
class Notice:
    """One record for one hook.

    Attributes:
        hook: its name in the configuration.
        record: index of the record in the log.
        attempts: that have failed.
        why: how the last one failed; empty before the first.
    """

    hook: str
    record: int
    attempts: int
    why: str


class Outbox:
    """The notices of one courier.

    Args:
        state: directory; made if it is missing.

    Raises:
        StoreError: it cannot be used.
    """

    def __init__(self, state: Path) -> None:
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._base = sqlite3.connect(state / "outbox.db", timeout=5, isolation_level=None)
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = FULL")
            self._base.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as err:
            raise StoreError(f"{state}: the courier's outbox cannot be used: {err}") from err

    def close(self) -> None:
        """Let go of the file."""
        self._base.close()

    @property
    def position(self) -> int:
        """Index of the last record that was looked at; -1 before the first."""
        row = self._base.execute("SELECT record FROM place").fetchone()
        return -1 if row is None else int(row[0])

    def take(self, records: Sequence[int], hooks: Sequence[str], position: int, now_us: int) -> int:
        """Put records in for all hooks, and remember how far we have looked: together or not at all.

        Returns:
            How many notices there was no room for. They are dead at once, the oldest dead ones make room.
        """
        with self._base:
            self._base.execute("BEGIN IMMEDIATE")
            rows = [(hook, record, now_us) for record in records for hook in hooks]
            self._base.executemany("INSERT OR IGNORE INTO notice VALUES (?, ?, 0, ?, 0, '')", rows)
            self._base.execute("INSERT INTO place VALUES (1, ?) ON CONFLICT DO UPDATE SET record = excluded.record", (position,))
            (count,) = self._base.execute("SELECT count(*) FROM notice").fetchone()
            surplus = max(int(count) - MAX_NOTICES, 0)
            if surplus:
                oldest = "SELECT hook, record FROM notice ORDER BY is_dead DESC, record LIMIT ?"
                self._base.execute(f"DELETE FROM notice WHERE (hook, record) IN ({oldest})", (surplus,))  # noqa: S608  no data in it
        return surplus

    def due(self, hook: str, now_us: int) -> Notice | None:
        """The oldest notice that a hook should get now."""
        statement = (
            "SELECT hook, record, attempts, why FROM notice WHERE hook = ? AND is_dead = 0 AND due_us <= ? ORDER BY due_us, record LIMIT 1"
        )
        row = self._base.execute(statement, (hook, now_us)).fetchone()
        return None if row is None else Notice(*row)

    def delivered(self, notice: Notice) -> None:
        """Forget it."""
        self._base.execute("DELETE FROM notice WHERE hook = ? AND record = ?", (notice.hook, notice.record))

    def failed(self, notice: Notice, why: str, now_us: int, spread: float) -> bool:
        """Try it again later, or never.

        Args:
            notice: which.
            why: in words.
            now_us: microseconds since the epoch.
            spread: a number from 0 to 1, so that many notices do not come back at once.

        Returns:
            Whether it is dead now.
        """
        attempts = notice.attempts + 1
        is_dead = attempts >= MAX_ATTEMPTS
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (attempts - 1), _MAX_PAUSE_S) * (0.5 + spread)
        self._base.execute(
            "UPDATE notice SET attempts = ?, due_us = ?, is_dead = ?, why = ? WHERE hook = ? AND record = ?",
            (attempts, now_us + int(pause_s * 1_000_000), is_dead, why[:_MAX_WHY_CHARACTERS], notice.hook, notice.record),
        )
        return is_dead

    def dead(self) -> list[Notice]:
        """Notices that are tried no more, oldest first."""
        rows = self._base.execute("SELECT hook, record, attempts, why FROM notice WHERE is_dead = 1 ORDER BY record, hook")
        return [Notice(*row) for row in rows]

    def revive(self, hook: str = "", record: int = -1) -> int:
        """Send dead notices again, all of them or those of one hook or record; how many."""
        statement = (
            "UPDATE notice SET attempts = 0, due_us = 0, is_dead = 0 WHERE is_dead = 1 AND (? = '' OR hook = ?) AND (? < 0 OR record = ?)"
        )
        return self._base.execute(statement, (hook, hook, record, record)).rowcount

    def counts(self) -> tuple[int, int]:
        """How many notices wait, and how many are dead."""
        row = self._base.execute("SELECT count(*) FILTER (WHERE is_dead = 0), count(*) FILTER (WHERE is_dead = 1) FROM notice").fetchone()
        return int(row[0]), int(row[1])
