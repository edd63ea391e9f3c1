"""The embedded store: one SQLite database in WAL mode with `synchronous=FULL`, one writer, one broker per directory.

SQLite syncs the log of a commit before COMMIT returns (sqlite.org/pragma.html#pragma_synchronous), which is the promise that
the record stands on. The store checks at opening that SQLite really is set so.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from keybroker.audit.map import TrailEnd
from keybroker.audit.merkle import Nodes
from keybroker.authority.store import freezes, glass, opening, policies, tree
from keybroker.authority.store.faults import StoreBrokenError, StoreConflictError, is_fatal, name_of, unavailable
from keybroker.authority.store.operation_tables import OperationTables
from keybroker.authority.store.policies import PolicyVersion
from keybroker.authority.store.units import UnitTable
from keybroker.authority.timekeeper import ClockRow
from keybroker.model.freeze import Freeze
from keybroker.model.glass import BrokenGlass

# A checkpoint stops the next commit, at 64 waiting, for about 4 ms with 1,000 frames and 14 ms with 4,000; each costs two syncs more.
CHECKPOINT_FRAMES = 2_000
_FRAMES_PER_COMMIT, _FRAMES_PER_RECORD = 4.0, 0.75  # measured with records of 1.1 kB; SQLite does not say without a checkpoint
_AT_ONCE = (64, 16, 4, 1)  # rows of one statement


def _statements(head: str, row: str, end: str = "") -> dict[int, str]:
    """One statement for each number of rows.

    Python's sqlite3 gives up the interpreter's lock at each step of a statement, and has to wait for it behind the event loop: a
    hundred times a commit, if every row is a statement of its own.
    """
    return {rows: head + ",".join([row] * rows) + end for rows in _AT_ONCE}


_ADD_RECORDS = _statements(
    "INSERT INTO record (idx, time_us, kind, trail, trail_index, key, outcome, use, hash, leaf) VALUES ", "(?,?,?,?,?,?,?,?,?,?)"
)
_OPEN_USES = _statements("INSERT INTO open_use VALUES ", "(?,?)")
_CLOSE_USES = _statements("DELETE FROM open_use WHERE use IN (", "?", ")")

_TILE_ROW = "INSERT INTO tile_hash (level, idx, hash) VALUES (?,?,?)"
_ROOTS_PER_COMMIT = 2_000
_TRAIL_ENDS = """
SELECT spiffe_id, trail_index, hash FROM trail JOIN record ON record.trail = trail.id
WHERE trail_index = (SELECT max(trail_index) FROM record WHERE record.trail = trail.id)
"""


class LeafRow(NamedTuple):
    """One record as it is stored, column by column; a tuple, because one is made for each record and handed to SQLite as it is."""

    idx: int
    time_us: int
    kind: str
    trail: int | None
    trail_index: int | None
    key: str
    outcome: str
    use: str
    hash: bytes
    leaf: bytes


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the log ends: how many records, and the time of the last, microseconds since the epoch."""

    size: int
    time_us: int


@dataclass(frozen=True, slots=True)
class TrailHead:
    """The end of one workload's chain. `rowid` is the trail's number in the store."""

    rowid: int
    count: int
    head: str


@dataclass(frozen=True, slots=True)
class IdempotentUse:
    """What an idempotency key stands for. `answer` is None until a signature was released."""

    body_sha256: bytes
    use: str
    made_us: int
    answer: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True)
class Pin:
    """The public key that a key version had when it was first seen; DER SubjectPublicKeyInfo."""

    name: str
    version: int
    family: str
    spki: bytes = field(repr=False)
    pinned_us: int


class SqliteStore:
    """The writer's side. All methods but `open` and `close` are called by one thread at a time: the journal's."""

    def __init__(self, connection: sqlite3.Connection, lock: int) -> None:
        self._db = connection
        self._lock = lock
        self.operations = OperationTables(connection)
        self._frames = 0.0  # in the write-ahead log since the last checkpoint, about
        self._staged = 0  # records of the transaction under way
        self._units = UnitTable(connection)

    @classmethod
    def open(cls, state: Path) -> SqliteStore:
        """Open or make the database in a directory, for this process alone.

        Raises:
            StoreError: another broker has it, it is damaged or of a newer version, or it cannot keep its promise.
            StoreBrokenError: not now; starting again makes sense.
        """
        lock = opening.lock(state)
        try:
            store = cls(opening.writer(state), lock)
            store.grow_tree()
        except BaseException:
            os.close(lock)
            raise
        return store

    def close(self) -> None:
        """Close the database and let another broker have it."""
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is durable when the block is left, or none of it is there.

        Raises:
            AuditUnavailableError: nothing was written; trying again later makes sense (disk full, write error).
            AuditBusyError: the same, because another process has the database locked.
            StoreConflictError: nothing was written, and never will be.
            StoreBrokenError: what was written is unknown; the process must end, start again and verify.
        """
        self._staged = 0
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._units.begin()
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as err:
            self._roll_back(err)
            if isinstance(err, sqlite3.IntegrityError):
                raise StoreConflictError(name_of(err)) from err
            msg = "The record cannot be written now; nothing was signed or released."
            raise unavailable(err, msg) from err
        except BaseException as err:
            self._roll_back(err)
            raise
        self._frames += _FRAMES_PER_COMMIT + _FRAMES_PER_RECORD * self._staged

    def _roll_back(self, why: BaseException) -> None:
        if isinstance(why, sqlite3.Error) and is_fatal(why):
            msg = f"the database failed ({name_of(why)})"
            raise StoreBrokenError(msg) from why
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error as err:
            msg = f"the database cannot roll back ({name_of(err)})"
            raise StoreBrokenError(msg) from err

    def checkpoint(self) -> str:
        """Move the write-ahead log into the database when it has grown long enough. Commits are durable without it.

        Returns:
            Why it could not be done now; empty if it was, or is not due. It is tried again when the log has grown as much again.

        Raises:
            StoreBrokenError: a sync failed, or the database is damaged.
        """
        if self._frames < CHECKPOINT_FRAMES:
            return ""
        self._frames = 0.0
        try:
            self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        except sqlite3.Error as err:
            if is_fatal(err):
                msg = f"the database failed ({name_of(err)})"
                raise StoreBrokenError(msg) from err
            return name_of(err)
        return ""

    def tail(self) -> Tail:
        """Where the log ends."""
        row = self._db.execute("SELECT idx, time_us FROM record ORDER BY idx DESC LIMIT 1").fetchone()
        return Tail(row[0] + 1, row[1]) if row else Tail(0, 0)

    @property
    def units(self) -> UnitTable:
        """The units that limits have taken."""
        return self._units

    def clock(self) -> ClockRow | None:
        """When the clock was last seen to be right; None in a database that has never kept it."""
        row = self._db.execute("SELECT boot, uptime_us, time_us, steady_us, distrusted FROM clock").fetchone()
        return ClockRow(*row) if row else None

    def save_clock(self, row: ClockRow) -> None:
        """Keep it. Called inside a transaction."""
        values = (row.boot, row.uptime_us, row.time_us, row.steady_us, row.distrusted)
        self._db.execute("INSERT OR REPLACE INTO clock VALUES (1, ?, ?, ?, ?, ?)", values)

    def trail_head(self, spiffe_id: str) -> TrailHead:
        """The end of a workload's chain; an empty chain is begun where there is none. Called inside a transaction."""
        row = self._db.execute("SELECT id FROM trail WHERE spiffe_id = ?", (spiffe_id,)).fetchone()
        if row is None:
            rowid = self._db.execute("INSERT INTO trail (spiffe_id) VALUES (?)", (spiffe_id,)).lastrowid
            return TrailHead(int(rowid or 0), 0, "")
        last = self._db.execute(
            "SELECT trail_index, hash FROM record WHERE trail = ? ORDER BY trail_index DESC LIMIT 1", (row[0],)
        ).fetchone()
        return TrailHead(row[0], last[0] + 1, last[1].hex()) if last else TrailHead(row[0], 0, "")

    def grow_tree(self) -> None:
        """Make the roots of tiles that are not there: of a log that was written before there was a tree."""
        size = self.tail().size
        while roots := tree.missing(self._db, size, _ROOTS_PER_COMMIT):
            with self.transaction():
                self._db.executemany(_TILE_ROW, roots)

    def nodes(self, size: int) -> Nodes:
        """The nodes of the tree at a size."""
        return tree.nodes(self._db, size)

    def trail_ends(self) -> dict[str, TrailEnd]:
        """Where every trail ends."""
        return {row[0]: TrailEnd(row[1] + 1, row[2]) for row in self._db.execute(_TRAIL_ENDS)}

    def keep_checkpoint(self, size: int, note: bytes) -> None:
        """Keep a checkpoint of this size."""
        self._db.execute("INSERT OR REPLACE INTO checkpoint VALUES (?, ?)", (size, note))

    def last_checkpoint(self) -> bytes:
        """The checkpoint with the largest size; empty if there is none."""
        row = self._db.execute("SELECT note FROM checkpoint ORDER BY size DESC LIMIT 1").fetchone()
        return row[0] if row else b""

    def append(
        self,
        rows: list[LeafRow],
        opened: Iterable[tuple[str, int]] = (),
        closed: Iterable[str] = (),
        tiles: Sequence[tuple[int, int, bytes]] = (),
    ) -> None:
        """Add records to the log.

        Args:
            opened: uses whose intents are among them, each with the index of its intent.
            closed: uses whose outcomes are.
            tiles: roots of the tiles of the tree that they fill: level, index, hash.
        """
        self._staged += len(rows)
        if tiles:
            self._db.executemany(_TILE_ROW, tiles)
        self._execute(_ADD_RECORDS, rows)
        self._execute(_OPEN_USES, list(opened))
        self._execute(_CLOSE_USES, [(use,) for use in closed])

    def _execute(self, statements: dict[int, str], rows: Sequence[tuple[object, ...]]) -> None:
        done = 0
        for count in _AT_ONCE:
            while len(rows) - done >= count:
                self._db.execute(statements[count], list(chain.from_iterable(rows[done : done + count])))
                done += count

    def open_uses(self) -> list[tuple[str, bytes]]:
        """Uses without an outcome, oldest first, each with the leaf of its intent."""
        rows = self._db.execute("SELECT open_use.use, leaf FROM open_use JOIN record ON idx = intent ORDER BY intent")
        return [(use, leaf) for use, leaf in rows]

    def claim_idempotency(self, scope: bytes, body_sha256: bytes, use: str, made_us: int) -> None:
        """From now on this idempotency key stands for this use."""
        self._db.execute("INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?, ?, NULL)", (scope, body_sha256, use, made_us))

    def answer_idempotency(self, scope: bytes, use: str, answer: bytes) -> None:
        """The use has been released; the same key gets the same answer."""
        self._db.execute("UPDATE idempotency SET answer = ? WHERE scope = ? AND use = ?", (answer, scope, use))

    def forget_idempotency(self, before_us: int) -> None:
        """Drop the keys that are older; a bounded number at a time."""
        self._db.execute(
            "DELETE FROM idempotency WHERE scope IN (SELECT scope FROM idempotency WHERE made_us < ? LIMIT 1000)", (before_us,)
        )

    def apply(self, effect: Callable[[sqlite3.Connection], None]) -> None:
        """Change a table that this file does not know, in the transaction under way."""
        effect(self._db)

    def freezes(self) -> list[Freeze]:
        """Every freeze in force, oldest first."""
        return freezes.load(self._db)

    def glass(self) -> list[BrokenGlass]:
        """What was opened and has not been reviewed, oldest first."""
        return glass.load(self._db)

    def policy_version(self) -> PolicyVersion | None:
        """The newest version of the rules that is kept here, or None."""
        return policies.newest(self._db)

    def policy_changes(self) -> frozenset[str]:
        """The digests of all proposals that have taken effect."""
        return policies.changes(self._db)

    def pins(self) -> list[Pin]:
        """Every pinned key version."""
        return [Pin(*row) for row in self._db.execute("SELECT name, version, family, spki, pinned_us FROM key_version")]

    def pin(self, pin: Pin) -> None:
        """Pin a key version. There is no way to change one."""
        self._db.execute("INSERT INTO key_version VALUES (?, ?, ?, ?, ?)", (pin.name, pin.version, pin.family, pin.spki, pin.pinned_us))
