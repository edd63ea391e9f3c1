"""The tables of the embedded store, and how a database comes to have them.

Each step brings a database from one format to the next, and is never edited once it has been released. A database says which format it
has (`PRAGMA user_version`), in the same transaction that makes it so: a crash leaves one format or the next, and the next start goes on.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from keybroker.authority.store import operation_tables
from keybroker.errors import StoreError

_RECORD = """
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
_LIMITS = """
CREATE TABLE limit_unit (
    counter  BLOB NOT NULL,           -- digest of grant, window, what is counted apart, and which one
    seq      INTEGER NOT NULL,        -- units taken since the counter began, up to the last of this row
    units    INTEGER NOT NULL,        -- of this row
    until_us INTEGER NOT NULL,        -- steady time at which the last of them leaves the window; never falls as seq rises
    PRIMARY KEY (counter, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE clock (                  -- one row: when the clock was last seen to be right
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    boot       TEXT NOT NULL,         -- which boot of the host `uptime_us` counts from
    uptime_us  INTEGER NOT NULL,
    time_us    INTEGER NOT NULL,      -- time of day then
    steady_us  INTEGER NOT NULL,      -- steady time then
    distrusted TEXT NOT NULL          -- what was seen since, until an operator has acknowledged it; empty otherwise
) STRICT;
"""
_FREEZES = """
CREATE TABLE freeze (
    id        TEXT PRIMARY KEY,       -- a ULID
    kind      TEXT NOT NULL,
    target    TEXT NOT NULL,
    reason    TEXT NOT NULL,
    frozen_by TEXT NOT NULL,
    since     TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""
_POLICIES = """
CREATE TABLE policy_version (
    revision INTEGER PRIMARY KEY,
    change   TEXT NOT NULL,           -- digest of the proposal that made it; '' where it was read from disk
    files    BLOB NOT NULL,           -- JSON: grant files by name; none where the broker went back to files on disk
    since    TEXT NOT NULL
) STRICT;
CREATE UNIQUE INDEX policy_version_change ON policy_version (change) WHERE change <> '';  -- no proposal takes effect twice
"""
_GLASS = """
CREATE TABLE glass (
    id        TEXT PRIMARY KEY,       -- a ULID
    grant_id  TEXT NOT NULL,
    reason    TEXT NOT NULL,
    opened_by TEXT NOT NULL,
    person    TEXT NOT NULL,
    opened_us INTEGER NOT NULL,
    until_us  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""
_TREE = """
CREATE TABLE tile_hash (
    level INTEGER NOT NULL,           -- from 1; the leaf hashes, level 0, are in the records
    idx   INTEGER NOT NULL,
    hash  BLOB NOT NULL,              -- root of a full tile of the level below
    PRIMARY KEY (level, idx)
) STRICT, WITHOUT ROWID;
CREATE TABLE checkpoint (
    size INTEGER PRIMARY KEY,
    note BLOB NOT NULL                -- signed
) STRICT;
"""
STEPS = (_RECORD, _LIMITS, operation_tables.TABLES, _FREEZES, _POLICIES, _GLASS, _TREE)


def require_known(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database that this version must not touch. Writes nothing.

    Raises:
        StoreError: of a newer format, or of another program.
        sqlite3.Error: it cannot be read.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > len(STEPS):
        msg = f"{path}: made by a newer keybroker (format {version}, this one knows {len(STEPS)}); upgrade this host"
        raise StoreError(msg)
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if bool(version) != ("record" in tables) or (tables and not version):
        msg = f"{path}: a database, but not keybroker's; name another `authority.state`"
        raise StoreError(msg)


def migrate(db: sqlite3.Connection, steps: tuple[str, ...] = STEPS) -> None:
    """Bring a known database to the newest format, one step in one transaction after the other."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    for number, step in enumerate(steps[version:], version + 1):
        db.executescript(f"BEGIN IMMEDIATE; {step} PRAGMA user_version = {number}; COMMIT;")
