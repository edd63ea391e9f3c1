"""Reading the record: pages in short read transactions, so that a long query never holds back the write-ahead log."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, field
from pathlib import Path

from keybroker.authority.store.sqlite import IdempotentUse

MAX_PAGE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class RecordFilter:
    """What a page may hold; empty text and None do not filter.

    Attributes:
        after: only records with a higher index.
        since_us: not earlier, microseconds since the epoch.
        until_us: earlier than this.
        limit: records at most.
    """

    trail: str = ""
    key: str = ""
    kind: str = ""
    outcome: str = ""
    use: str = ""
    since_us: int | None = None
    until_us: int | None = None
    after: int = -1
    limit: int = 100


@dataclass(frozen=True, slots=True)
class Page:
    """Leaves, oldest first. `last` is the index to go on after, None at the end."""

    leaves: tuple[bytes, ...] = field(repr=False)
    last: int | None


class Reader:
    """Read-only, for one thread."""

    def __init__(self, state: Path) -> None:
        self._db = sqlite3.connect(
            f"file:{state / 'keybroker.db'}?mode=ro", uri=True, timeout=5, isolation_level=None, check_same_thread=False
        )
        self._db.execute("PRAGMA query_only = ON")

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def page(self, wanted: RecordFilter) -> Page:
        """One page of the log."""
        where, values = ["idx > ?"], [wanted.after]  # type: tuple[list[str], list[int | str]]
        if wanted.trail:
            where.append("trail = (SELECT id FROM trail WHERE spiffe_id = ?)")
            values.append(wanted.trail)
        for column, value in (("key", wanted.key), ("kind", wanted.kind), ("outcome", wanted.outcome), ("use", wanted.use)):
            if value:
                where.append(f"{column} = ? AND {column} <> ''")
                values.append(value)
        if wanted.since_us is not None:
            where.append("idx >= ?")
            values.append(self._first_at(wanted.since_us))
        if wanted.until_us is not None:
            where.append("idx < ?")
            values.append(self._first_at(wanted.until_us))
        statement = f"SELECT idx, leaf FROM record WHERE {' AND '.join(where)} ORDER BY idx LIMIT ?"  # noqa: S608  only names of ours
        leaves: list[bytes] = []
        size, last, is_cut = 0, wanted.after, False
        for index, leaf in self._db.execute(statement, [*values, wanted.limit + 1]):
            if len(leaves) == wanted.limit or size + len(leaf) > MAX_PAGE_BYTES:
                is_cut = True
                break
            leaves.append(leaf)
            size += len(leaf)
            last = index
        return Page(tuple(leaves), last if is_cut else None)

    def leaf(self, index: int) -> bytes | None:
        """The record at one position, or None."""
        row = self._db.execute("SELECT leaf FROM record WHERE idx = ?", (index,)).fetchone()
        return row[0] if row else None

    def leaves(self) -> list[bytes]:
        """The whole log. For checks of small logs."""
        return [row[0] for row in self._db.execute("SELECT leaf FROM record ORDER BY idx")]

    def idempotent_use(self, scope: bytes) -> IdempotentUse | None:
        """What an idempotency key stands for, or None."""
        row = self._db.execute("SELECT body_sha256, use, made_us, answer FROM idempotency WHERE scope = ?", (scope,)).fetchone()
        return IdempotentUse(*row) if row else None

    def outcome_index(self, use: str) -> int:
        """The index of a use's outcome; -1 if it has none."""
        row = self._db.execute("SELECT idx FROM record WHERE use = ? AND use <> '' AND kind = 'outcome'", (use,)).fetchone()
        return row[0] if row else -1

    def _first_at(self, time_us: int) -> int:
        """The index of the first record that is not earlier, by bisection: times never fall as indexes rise."""
        low, high = 0, (self._db.execute("SELECT max(idx) FROM record").fetchone()[0] or -1) + 1
        while low < high:
            middle = (low + high) // 2
            if self._db.execute("SELECT time_us FROM record WHERE idx = ?", (middle,)).fetchone()[0] < time_us:
                low = middle + 1
            else:
                high = middle
        return low
