"""Reading the record: pages in short read transactions, so that a long query never holds back the write-ahead log."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keybroker.authority.store import opening
from keybroker.authority.store.faults import name_of
from keybroker.authority.store.sqlite import IdempotentUse
from keybroker.errors import AuditUnavailableError
from keybroker.telemetry import logger

_log = logger()

MAX_PAGE_BYTES = 8 * 1024 * 1024
_WINDOW = 20_000  # places in one read transaction: some 10 ms


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
    """Read-only, for one thread. Every method may raise AuditUnavailableError: the database cannot be read now."""

    def __init__(self, state: Path) -> None:
        self._db = opening.reader(state)

    def close(self) -> None:
        """Close the connection."""
        self._db.close()

    def page(self, wanted: RecordFilter) -> Page:
        """One page of the log. However much has to be looked through for it, no single read transaction is long."""
        low, high = wanted.after + 1, self._size()
        if wanted.since_us is not None:
            low = max(low, self._first_at(wanted.since_us))
        if wanted.until_us is not None:
            high = min(high, self._first_at(wanted.until_us))
        column, where, values = "idx", [], []  # type: tuple[str, list[str], list[int | str]]
        if wanted.trail:
            trail = self._first("SELECT id FROM trail WHERE spiffe_id = ?", (wanted.trail,))
            if trail is None:
                return Page((), None)
            column, where, values = "trail_index", ["trail = ?"], [trail[0]]
            low, high = self._trail_index(trail[0], low), self._trail_index(trail[0], high)
        for name, value in (("key", wanted.key), ("kind", wanted.kind), ("outcome", wanted.outcome), ("use", wanted.use)):
            if value:
                where.append(f"{name} = ? AND {name} <> ''")
                values.append(value)
        where += [f"{column} >= ?", f"{column} < ?"]
        statement = f"SELECT idx, leaf FROM record WHERE {' AND '.join(where)} ORDER BY {column} LIMIT ?"  # noqa: S608  only names of ours
        return self._collect(statement, values, range(low, high), wanted.limit)

    def _collect(self, statement: str, values: list[int | str], places: range, limit: int) -> Page:
        """Look through places, a window at a time, until a page is full."""
        leaves: list[bytes] = []
        size, last = 0, -1
        for start in places[::_WINDOW]:
            window = [*values, start, min(start + _WINDOW, places.stop), limit + 1 - len(leaves)]
            for index, leaf in self._rows(statement, window):
                if len(leaves) == limit or size + len(leaf) > MAX_PAGE_BYTES:
                    return Page(tuple(leaves), last)
                leaves.append(leaf)
                size += len(leaf)
                last = index
        return Page(tuple(leaves), None)

    def leaf(self, index: int) -> bytes | None:
        """The record at one position, or None."""
        row = self._first("SELECT leaf FROM record WHERE idx = ?", (index,))
        return row[0] if row else None

    def leaves(self) -> list[bytes]:
        """The whole log. For checks of small logs."""
        return [row[0] for row in self._rows("SELECT leaf FROM record ORDER BY idx")]

    def idempotent_use(self, scope: bytes) -> IdempotentUse | None:
        """What an idempotency key stands for, or None."""
        row = self._first("SELECT body_sha256, use, made_us, answer FROM idempotency WHERE scope = ?", (scope,))
        return IdempotentUse(*row) if row else None

    def outcome_index(self, use: str) -> int:
        """The index of a use's outcome; -1 if it has none."""
        row = self._first("SELECT idx FROM record WHERE use = ? AND use <> '' AND kind = 'outcome'", (use,))
        return row[0] if row else -1

    def _size(self) -> int:
        row = self._first("SELECT coalesce(max(idx), -1) + 1 FROM record")
        return row[0] if row else 0

    def _first_at(self, time_us: int) -> int:
        """The index of the first record that is not earlier: times never fall as indexes rise."""
        return self._bisect("SELECT time_us < ? FROM record WHERE idx = ?", (time_us,), self._size())

    def _trail_index(self, trail: int, index: int) -> int:
        """How many records of a trail come before an index: their numbers rise together."""
        newest = self._first("SELECT coalesce(max(trail_index), -1) + 1 FROM record WHERE trail = ?", (trail,))
        return self._bisect("SELECT idx < ? FROM record WHERE trail = ? AND trail_index = ?", (index, trail), newest[0] if newest else 0)

    def _bisect(self, is_before: str, values: tuple[int, ...], size: int) -> int:
        """The first place of `size` for which a statement does not say that it is before."""
        low, high = 0, size
        while low < high:
            middle = (low + high) // 2
            row = self._first(is_before, (*values, middle))
            if row is not None and row[0]:
                low = middle + 1
            else:
                high = middle
        return low

    def _first(self, statement: str, values: tuple[Any, ...] = ()) -> tuple[Any, ...] | None:
        return next(self._rows(statement, values), None)

    def _rows(self, statement: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._db.execute(statement, values)
        except sqlite3.Error as err:
            _log.exception("the record cannot be read", reason=name_of(err))
            raise AuditUnavailableError("The record cannot be read now.", retry_after=1) from err
