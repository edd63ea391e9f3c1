"""The embedded store: one SQLite database in WAL mode with `synchronous=FULL`, one writer, one broker per directory.

SQLite syncs the log of a commit before COMMIT returns (sqlite.org/pragma.html#pragma_synchronous), which is the promise that
the record stands on. The store checks at opening that SQLite really is set so.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from keybroker.errors import AuditUnavailableError, StoreError

SCHEMA_VERSION = 1

_SCHEMA = """
CREATE TABLE trail (
    id        INTEGER PRIMARY KEY,
    spiffe_id TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE record (
    idx         INTEGER PRIMARY KEY,  -- position in the log, from 0
    time_us     INTEGER NOT NULL,     -- never falls as idx rises, so a time is found by bisection
    kind        TEXT NOT NULL,
    trail       INTEGER REFERENCES trail,
    trail_index INTEGER,
    key         TEXT NOT NULL,
    outcome     TEXT NOT NULL,
    use         TEXT NOT NULL,
    hash        BLOB NOT NULL,        -- RFC 6962 leaf hash
    leaf        BLOB NOT NULL         -- the bytes that were hashed
) STRICT;
CREATE UNIQUE INDEX record_trail ON record (trail, trail_index) WHERE trail IS NOT NULL;  -- a chain cannot fork
CREATE UNIQUE INDEX record_use ON record (use, kind) WHERE use <> '';  -- one intent and one outcome for each use
CREATE INDEX record_key ON record (key, idx) WHERE key <> '';
CREATE INDEX record_kind ON record (kind, idx);
CREATE TABLE open_use (
    use    TEXT PRIMARY KEY,
    intent INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE idempotency (
    scope       BLOB PRIMARY KEY,     -- SHA-256 of caller, route, key and idempotency key
    body_sha256 BLOB NOT NULL,
    use         TEXT NOT NULL,
    made_us     INTEGER NOT NULL,
    answer      BLOB                  -- the released answer; NULL until there is one
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_made ON idempotency (made_us);
CREATE TABLE key_version (
    name      TEXT NOT NULL,
    version   INTEGER NOT NULL,
    family    TEXT NOT NULL,
    spki      BLOB NOT NULL,          -- pinned at first sight; another one is refused for ever
    pinned_us INTEGER NOT NULL,
    PRIMARY KEY (name, version)
) STRICT, WITHOUT ROWID;
"""

# What a failed sync means is unknown (the kernel may have dropped the pages), so nothing may be written after one.
_FATAL = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_LEAF_ROW = "INSERT INTO record (idx, time_us, kind, trail, trail_index, key, outcome, use, hash, leaf) VALUES (?,?,?,?,?,?,?,?,?,?)"


class StoreBrokenError(StoreError):
    """The store failed in a way after which only a restart tells what is on disk."""


@dataclass(frozen=True, slots=True)
class LeafRow:
    """One record as it is stored."""

    index: int
    time_us: int
    kind: str
    trail: int | None
    trail_index: int | None
    key: str
    outcome: str
    use: str
    hash: bytes
    leaf: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Tail:
    """Where the log ends: how many records, the time of the last, and the use each without an outcome with its intent's index."""

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

    @classmethod
    def open(cls, state: Path) -> SqliteStore:
        """Open or make the database in a directory, for this process alone.

        Raises:
            StoreError: another broker has it, it is of a newer version, or it cannot keep its promise.
        """
        lock = _lock(state)
        try:
            return cls(_open_writer(state / "keybroker.db"), lock)
        except sqlite3.Error as err:
            os.close(lock)
            msg = f"the database in {state} cannot be opened ({_name(err)}); restore it, or name another `authority.state`"
            raise StoreError(msg) from err
        except BaseException:
            os.close(lock)
            raise

    def close(self) -> None:
        """Close the database and let another broker have it."""
        self._db.close()
        os.close(self._lock)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Everything inside is durable when the block is left, or none of it is there.

        Raises:
            AuditUnavailableError: nothing was written; trying again later makes sense (disk full, write error).
            StoreBrokenError: what was written is unknown; the process must end, start again and verify.
        """
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as err:
            self._roll_back(err)
            msg = "The record cannot be written now; nothing was signed or released."
            raise AuditUnavailableError(msg, retry_after=1) from err
        except BaseException as err:
            self._roll_back(err)
            raise

    def _roll_back(self, why: BaseException) -> None:
        code = getattr(why, "sqlite_errorcode", None)
        if code in _FATAL:
            msg = f"the database failed ({_name(why)})"
            raise StoreBrokenError(msg) from why
        try:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
        except sqlite3.Error as err:
            msg = f"the database cannot roll back ({_name(err)})"
            raise StoreBrokenError(msg) from err

    def tail(self) -> Tail:
        """Where the log ends."""
        row = self._db.execute("SELECT idx, time_us FROM record ORDER BY idx DESC LIMIT 1").fetchone()
        return Tail(row[0] + 1, row[1]) if row else Tail(0, 0)

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

    def append(self, rows: list[LeafRow]) -> None:
        """Add records to the log."""
        self._db.executemany(
            _LEAF_ROW,
            [(r.index, r.time_us, r.kind, r.trail, r.trail_index, r.key, r.outcome, r.use, r.hash, r.leaf) for r in rows],
        )

    def open_use(self, use: str, intent: int) -> None:
        """An intent is on record and has no outcome yet."""
        self._db.execute("INSERT INTO open_use VALUES (?, ?)", (use, intent))

    def close_use(self, use: str) -> None:
        """The use has its outcome."""
        self._db.execute("DELETE FROM open_use WHERE use = ?", (use,))

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

    def pins(self) -> list[Pin]:
        """Every pinned key version."""
        return [Pin(*row) for row in self._db.execute("SELECT name, version, family, spki, pinned_us FROM key_version")]

    def pin(self, pin: Pin) -> None:
        """Pin a key version. There is no way to change one."""
        self._db.execute("INSERT INTO key_version VALUES (?, ?, ?, ?, ?)", (pin.name, pin.version, pin.family, pin.spki, pin.pinned_us))


def _lock(state: Path) -> int:
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        msg = f"{state}: {err.strerror}; the authority's user must be able to write there"
        raise StoreError(msg) from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        msg = f"{state}: another broker is running on this state; stop it, or name another `authority.state`"
        raise StoreError(msg) from err
    return lock


def _open_writer(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            msg = f"{path.parent}: this file system cannot hold a database in WAL mode; use a local one"
            raise StoreError(msg)
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA synchronous").fetchone()[0] != 2:
            msg = "SQLite does not sync on commit; the record would not survive a power loss"
            raise StoreError(msg)
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA cache_size = -65536")  # KiB
        db.execute("PRAGMA wal_autocheckpoint = 4000")  # pages of 4 KiB; a longer log means fewer, longer pauses
        _migrate(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        msg = f"{path}: made by a newer keybroker (format {version}, this one knows {SCHEMA_VERSION}); upgrade this host"
        raise StoreError(msg)
    if version == 0:
        db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")


def _name(err: BaseException) -> str:
    return str(getattr(err, "sqlite_errorname", type(err).__name__))
