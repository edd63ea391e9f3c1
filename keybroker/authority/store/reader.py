"""Reading the record: pages in short read transactions, so that a long query never holds back the write-ahead log.

A page looks where the catalog says that something may be, and no longer than `PAGE_SECONDS`: what it has by then is the page, and the
next one goes on from there. So no question, however rare what it asks for, keeps the thread for long.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from keybroker.audit.merkle import Nodes
from keybroker.audit.tiles import Tile, nodes_from
from keybroker.authority.operations import End
from keybroker.authority.store import opening, tree
from keybroker.authority.store.catalog import BLOCK, HOUR_US, Catalog, Counted, Endings, Wanted
from keybroker.authority.store.facts import entry_of
from keybroker.authority.store.faults import name_of, unavailable
from keybroker.authority.store.operation_tables import OperationRow, made_of
from keybroker.authority.store.sqlite import IdempotentUse
from keybroker.authority.store.units import UnitTable
from keybroker.errors import AuditUnavailableError
from keybroker.telemetry import logger

Looked = TypeVar("Looked")
_LEAVES_AND_HASHES = "SELECT idx, leaf, hash FROM record WHERE idx >= ? AND idx < ? ORDER BY idx"

_log = logger()

MAX_PAGE_BYTES = 8 * 1024 * 1024
PAGE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class RecordFilter:
    """What a page may hold; empty text and None do not filter.

    Attributes:
        trails: SPIFFE IDs, of which one will do; None for any, and for records about the broker itself.
        key_version: with `key`; 0 for any.
        content: a content field, `NAME=VALUE`.
        after: only records with a higher index.
        since_us: not earlier, microseconds since the epoch.
        until_us: earlier than this.
        limit: records at most.
    """

    trails: tuple[str, ...] | None = None
    key: str = ""
    key_version: int = 0
    kind: str = ""
    outcome: str = ""
    use: str = ""
    algorithm: str = ""
    grant: str = ""
    svid: str = ""
    address: str = ""
    content: str = ""
    since_us: int | None = None
    until_us: int | None = None
    after: int = -1
    limit: int = 100

    def wanted(self) -> list[Wanted]:
        """As the catalog is asked."""
        one = ("kind", "outcome", "algorithm", "grant", "svid", "address", "content")
        found = [Wanted(name, (getattr(self, name),)) for name in one if getattr(self, name)]
        if self.key_version:
            found.append(Wanted("key_version", (f"{self.key}/{self.key_version}",)))
        elif self.key:
            found.append(Wanted("key", (self.key,)))
        if self.trails is not None and self.key:
            found.append(Wanted("workload_key", tuple(f"{trail} {self.key}" for trail in self.trails)))
        elif self.trails is not None:
            found.append(Wanted("workload", self.trails))
        return found


@dataclass(frozen=True, slots=True)
class Page:
    """Leaves, oldest first. `last` is the index to go on after, None at the end; a page may be short, even empty, before the end."""

    leaves: tuple[bytes, ...] = field(repr=False)
    last: int | None


@dataclass(frozen=True, slots=True)
class StoredOperation:
    """One operation: the leaf of its record, where that is, how it has ended, and the use that redeemed it, or nothing."""

    record: int
    leaf: bytes = field(repr=False)
    end: End
    use: str


class Reader:
    """Read-only, for one thread. Every method may raise AuditUnavailableError: the database cannot be read now.

    Args:
        state: the state directory.
        catalog: whether to keep a catalog there; without one, everything is looked through.
    """

    def __init__(self, state: Path, *, catalog: bool = False) -> None:
        self._db = opening.reader(state)
        self._catalog: Catalog | None = None
        if catalog:
            try:
                self._catalog = Catalog(state, self._db)
            except (sqlite3.Error, OSError) as err:
                _log.warning("there can be no catalog; questions look through everything", reason=str(err))

    def close(self) -> None:
        """Close the connection."""
        if self._catalog is not None:
            self._catalog.close()
        self._db.close()

    def advance(self) -> bool:
        """Take the next block of the log into the catalog. True if there may be another."""
        try:
            return self._catalog is not None and self._catalog.advance()
        except sqlite3.Error as err:
            _log.exception("the record cannot be read", reason=name_of(err))
            raise unavailable(err, "The record cannot be read now.") from err

    @property
    def size(self) -> int:
        """Records in the log."""
        return self._size()

    def page(self, wanted: RecordFilter) -> Page:
        """One page of the log."""
        between = self.places(wanted)
        if wanted.use:
            places = [index for (index,) in self._rows("SELECT idx FROM record WHERE use = ? AND use <> ''", (wanted.use,))]
            return self._collect(wanted, (range(index, index + 1) for index in sorted(places) if index in between), between.stop)
        return self._collect(wanted, self._spans(wanted, between), between.stop)

    def places(self, wanted: RecordFilter) -> range:
        """The indexes among which a filter looks: those after `after`, and between its times."""
        low, high = wanted.after + 1, self._size()
        if wanted.since_us is not None:
            low = max(low, self._first_at(wanted.since_us))
        if wanted.until_us is not None:
            high = min(high, self._first_at(wanted.until_us))
        return range(low, max(low, high))

    def _spans(self, wanted: RecordFilter, places: range) -> Iterator[range]:
        """Where to look, rising: what the catalog says, then everything that it does not cover."""
        covered = places.start
        if self._catalog is not None:
            try:
                yield from self._catalog.spans(wanted.wanted(), places)
                covered = max(covered, min(self._catalog.covered, places.stop))
            except sqlite3.Error as err:
                _log.warning("the catalog cannot be read; everything is looked through", reason=name_of(err))
        for start in range(covered, places.stop, BLOCK):
            yield range(start, min(start + BLOCK, places.stop))

    def _collect(self, wanted: RecordFilter, spans: Iterator[range], high: int) -> Page:
        """Look through places until the page is full or the time is up."""
        statement, values = _statement(wanted)
        is_fitting = _fitting(wanted)
        leaves: list[bytes] = []
        size, last = 0, -1
        deadline = time.monotonic() + PAGE_SECONDS
        for span in spans:
            for index, leaf in self._rows(statement, [*values, span.start, span.stop]):
                if not is_fitting(leaf):
                    continue
                if len(leaves) == wanted.limit or (leaves and size + len(leaf) > MAX_PAGE_BYTES):
                    return Page(tuple(leaves), last)
                leaves.append(leaf)
                size += len(leaf)
                last = index
            if time.monotonic() > deadline and span.stop < high:
                return Page(tuple(leaves), span.stop - 1)
        return Page(tuple(leaves), None)

    def end(self) -> tuple[int, int]:
        """How many records there are, and the time of the last, microseconds since the epoch."""
        row = self._first("SELECT idx, time_us FROM record ORDER BY idx DESC LIMIT 1")
        return (row[0] + 1, row[1]) if row else (0, 0)

    def counted(self, named: dict[str, str], since_us: int, until_us: int) -> Iterator[Counted]:
        """Uses that ended, and refusals, in a time: whole hours from the catalog, the rest from the record.

        Args:
            named: parts of a use that must be so: `workload`, `key`, `svid`, `person`.
            since_us: not earlier, microseconds since the epoch.
            until_us: earlier than this.
        """
        hours = _whole_hours(since_us, until_us)
        covered = 0
        if self._catalog is not None and hours:
            with _catalog_errors():
                yield from self._catalog.counted(named, hours)
            covered = self._catalog.covered
        low, high = self._first_at(since_us), min(self._first_at(until_us), self._size())
        first, last = (self._first_at(hour * HOUR_US) for hour in (hours.start, hours.stop)) if hours else (high, high)
        for places in (range(low, min(first, high)), range(max(covered, first), min(last, high)), range(max(last, low), high)):
            yield from self._counted_in(named, places)

    def counted_by_hour(self, named: dict[str, str], since_us: int, until_us: int) -> list[tuple[int, str, int]]:
        """The whole hours among them that the catalog covers: hour since 1970, ending, how many."""
        hours = _whole_hours(since_us, until_us)
        if self._catalog is None or not hours:
            return []
        with _catalog_errors():
            return list(self._catalog.counted_by_hour(named, hours))

    def _counted_in(self, named: dict[str, str], places: range) -> Iterator[Counted]:
        """The same, read off the records of some places."""
        endings = Endings(self._db)
        for start in range(places.start, places.stop, BLOCK):
            rows = self._rows("SELECT idx, time_us, leaf FROM record WHERE idx >= ? AND idx < ?", (start, min(start + BLOCK, places.stop)))
            for index, time_us, leaf in rows:
                entry = entry_of(leaf)
                asked = endings.asked(entry)
                if asked is not None and asked.is_named(named):
                    yield Counted(asked.use(entry.facts.outcome), time_us // HOUR_US, entry.times, index, index, time_us, time_us)

    def leaf(self, index: int) -> bytes | None:
        """The record at one position, or None."""
        row = self._first("SELECT leaf FROM record WHERE idx = ?", (index,))
        return row[0] if row else None

    def trails(self) -> list[str]:
        """Every workload that is on record."""
        return [row[0] for row in self._rows("SELECT spiffe_id FROM trail")]

    def leaves(self) -> list[bytes]:
        """The whole log. For checks of small logs."""
        return [row[0] for row in self._rows("SELECT leaf FROM record ORDER BY idx")]

    def leaves_between(self, start: int, end: int) -> list[bytes]:
        """The leaves at these positions, from `start` up to but not with `end`. Few of them: it is one transaction."""
        return [row[0] for row in self._rows("SELECT leaf FROM record WHERE idx >= ? AND idx < ? ORDER BY idx", (start, end))]

    def leaves_and_hashes(self, start: int, end: int) -> list[tuple[int, bytes, bytes]]:
        """Index, leaf and stored hash of the records at these positions, up to but not with `end`."""
        return [(row[0], row[1], row[2]) for row in self._rows(_LEAVES_AND_HASHES, (start, end))]

    def tile_root(self, level: int, index: int) -> bytes:
        """The stored root of a full tile, by the level above it; empty if there is none."""
        row = self._first("SELECT hash FROM tile_hash WHERE level = ? AND idx = ?", (level, index))
        return row[0] if row else b""

    def hashes(self, tile: Tile) -> list[bytes]:
        """The hashes of a tile; fewer than it is wide where the log is shorter."""
        try:
            return tree.hashes(self._db, tile)
        except sqlite3.Error as err:
            raise _unreadable(err) from err

    def nodes(self, size: int) -> Nodes:
        """The nodes of the tree at a size. They too may raise AuditUnavailableError."""
        return nodes_from(self.hashes, size)

    def checkpoint(self, at_most: int) -> tuple[int, bytes]:
        """The checkpoint with the largest size up to this one, and its size; 0 and nothing if there is none."""
        row = self._first("SELECT size, note FROM checkpoint WHERE size <= ? ORDER BY size DESC LIMIT 1", (at_most,))
        return (row[0], row[1]) if row else (0, b"")

    def checkpoints(self, after: int, until: int) -> list[tuple[int, bytes]]:
        """The checkpoints of sizes above `after` and up to `until`: size and note."""
        rows = self._rows("SELECT size, note FROM checkpoint WHERE size > ? AND size <= ? ORDER BY size", (after, until))
        return [(row[0], row[1]) for row in rows]

    def trail_leaves(self, trail: str, start: int, size: int, limit: int) -> list[bytes]:
        """Leaves of one trail, from its record of number `start` on, as far as they are among the first `size` of the log."""
        statement = (
            "SELECT leaf FROM record WHERE trail = (SELECT id FROM trail WHERE spiffe_id = ?)"
            " AND trail_index >= ? AND trail_index < ? AND idx < ? ORDER BY trail_index"
        )
        return [row[0] for row in self._rows(statement, (trail, start, start + limit, size))]

    def idempotent_use(self, scope: bytes) -> IdempotentUse | None:
        """What an idempotency key stands for, or None."""
        row = self._first("SELECT body_sha256, use, made_us, answer FROM idempotency WHERE scope = ?", (scope,))
        return IdempotentUse(*row) if row else None

    def look_at_units(self, look: Callable[[UnitTable], Looked]) -> Looked:
        """What somebody wants to know of the units that limits have taken."""
        try:
            return look(UnitTable(self._db))
        except sqlite3.Error as err:
            _log.exception("units cannot be read", reason=name_of(err))
            raise unavailable(err, "The record cannot be read now.") from err

    def outcome_index(self, use: str) -> int:
        """The index of a use's outcome; -1 if it has none."""
        row = self._first("SELECT idx FROM record WHERE use = ? AND use <> '' AND kind = 'outcome'", (use,))
        return row[0] if row else -1

    def operation(self, operation: str) -> StoredOperation | None:
        """One operation, or None."""
        statement = "SELECT operation.record, leaf, ended, operation.use FROM operation JOIN record ON idx = operation.record WHERE id = ?"
        row = self._first(statement, (operation,))
        return StoredOperation(row[0], row[1], End(row[2]), row[3]) if row else None

    def operations(self, requester: str, limit: int) -> list[OperationRow]:
        """The newest operations of one requester; of everybody, if empty."""
        where, values = ("WHERE requester = ?", (requester,)) if requester else ("", ())
        statement = f"SELECT * FROM operation {where} ORDER BY id DESC LIMIT ?"  # noqa: S608  constants
        return [made_of(row) for row in self._rows(statement, (*values, limit))]

    def approvals(self, operation: str) -> list[tuple[int, bytes]]:
        """The index and the leaf of every approval and refusal of an operation, oldest first."""
        statement = "SELECT idx, leaf FROM approval JOIN record ON idx = approval.record WHERE operation = ? ORDER BY idx"
        return [(index, leaf) for index, leaf in self._rows(statement, (operation,))]

    def live_operations(self, now_us: int) -> int:
        """How many operations have neither ended nor expired."""
        row = self._first("SELECT count(*) FROM operation WHERE ended = '' AND expires_us > ?", (now_us,))
        return row[0] if row else 0

    def _size(self) -> int:
        row = self._first("SELECT coalesce(max(idx), -1) + 1 FROM record")
        return row[0] if row else 0

    def _first_at(self, time_us: int) -> int:
        """The index of the first record that is not earlier: times never fall as indexes rise."""
        return self._bisect("SELECT time_us < ? FROM record WHERE idx = ?", (time_us,), self._size())

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
            raise _unreadable(err) from err


def _unreadable(err: sqlite3.Error) -> AuditUnavailableError:
    _log.error("the record cannot be read", reason=name_of(err), exc_info=err)
    return unavailable(err, "The record cannot be read now.")


def _statement(wanted: RecordFilter) -> tuple[str, list[str]]:
    """What the columns can tell."""
    where, values = ["idx >= ?", "idx < ?"], list[str]()
    conditions = []
    for name in ("key", "kind", "outcome", "use"):
        if getattr(wanted, name):
            conditions.append(f"{name} = ?")
            values.append(getattr(wanted, name))
    if wanted.trails is not None:
        marks = ",".join("?" * len(wanted.trails))
        conditions.append(f"trail IN (SELECT id FROM trail WHERE spiffe_id IN ({marks}))")  # noqa: S608  marks only
        values += wanted.trails
    # By position: an index that SQLite might like better would make it look through all that the index has, not through this span.
    return f"SELECT idx, leaf FROM record NOT INDEXED WHERE {' AND '.join([*conditions, *where])} ORDER BY idx", values  # noqa: S608  names of ours


def _fitting(wanted: RecordFilter) -> Callable[[bytes], bool]:
    """Whether a leaf says what the columns do not."""
    if not (wanted.key_version or wanted.algorithm or wanted.grant or wanted.svid or wanted.address or wanted.content):
        return lambda _leaf: True

    def is_fitting(leaf: bytes) -> bool:
        try:
            facts = entry_of(leaf).facts
        except msgspec.MsgspecError:
            return False
        return (
            wanted.key_version in {0, facts.version}
            and wanted.algorithm in {"", facts.algorithm}
            and (not wanted.grant or wanted.grant in facts.grants)
            and wanted.svid in {"", facts.svid}
            and wanted.address in {"", facts.address}
            and (not wanted.content or wanted.content in facts.fields)
        )

    return is_fitting


def _whole_hours(since_us: int, until_us: int) -> range:
    return range(-(-since_us // HOUR_US), until_us // HOUR_US)


@contextlib.contextmanager
def _catalog_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as err:
        _log.exception("the catalog cannot be read", reason=name_of(err))
        raise AuditUnavailableError("The catalog of the record cannot be read now; ask again soon.", retry_after=5) from err
