"""The tables of the embedded store, and how a database comes to have them.

Each step brings a database from one format to the next, and is never edited once it has been released. A database says which format it
has (`PRAGMA user_version`), in the same transaction that makes it so: a crash leaves one format or the next, and the next start goes on.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

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
CREATE TABLE limit_counter (
    id        INTEGER PRIMARY KEY,
    name      TEXT NOT NULL UNIQUE,   -- JSON: grant, window in seconds, what is counted apart, and which one
    window_us INTEGER NOT NULL
) STRICT;
CREATE TABLE limit_bucket (
    counter INTEGER NOT NULL,
    seq     INTEGER NOT NULL,         -- units taken since the counter began, up to the end of this bucket
    units   INTEGER NOT NULL,         -- in this bucket
    last_us INTEGER NOT NULL,         -- record time of the last of them
    PRIMARY KEY (counter, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE clock (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    boot       TEXT NOT NULL,         -- which boot of the host `boot_us` counts from
    boot_us    INTEGER NOT NULL,      -- by the clock that nobody sets
    time_us    INTEGER NOT NULL,      -- by the clock that tells the time, at the same moment
    distrusted TEXT NOT NULL          -- what was seen, until an operator has acknowledged it; empty otherwise
) STRICT;
"""
STEPS = (_RECORD, _LIMITS)


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
