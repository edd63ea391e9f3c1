"""The tables of the embedded store, and how a database comes to have them."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from keybroker.errors import StoreError

SCHEMA_VERSION = 1

_TABLES = """
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


def require_known(db: sqlite3.Connection, path: Path) -> None:
    """Refuse a database that this version must not touch. Writes nothing.

    Raises:
        StoreError: of a newer format, or of another program.
        sqlite3.Error: it cannot be read.
    """
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        msg = f"{path}: made by a newer keybroker (format {version}, this one knows {SCHEMA_VERSION}); upgrade this host"
        raise StoreError(msg)
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if bool(version) != ("record" in tables) or (tables and not version):
        msg = f"{path}: a database, but not keybroker's; name another `authority.state`"
        raise StoreError(msg)


def migrate(db: sqlite3.Connection) -> None:
    """Bring a known database to this format, wholly or not at all."""
    if db.execute("PRAGMA user_version").fetchone()[0] == 0:
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;")
