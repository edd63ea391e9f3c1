"""How the state directory is opened: for one broker alone, in a state that keeps its promise, with nothing left to chance.

After a failed sync, the kernel may show this process pages that the disk does not hold, and call them clean (Rebello et al.,
"Can Applications Recover from fsync Failures?", USENIX ATC 2020). So a start does not trust what it reads in the write-ahead log: it
writes all of it into the database again, syncs that, and begins an empty log.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keybroker.authority.store import schema, tail
from keybroker.authority.store.faults import StoreBrokenError, is_fatal, is_lasting, name_of
from keybroker.errors import StoreError

DATABASE = "keybroker.db"
BUSY_MS = 1_000  # how long a commit waits for another process that has locked the database
_SETTLE_MS = 10_000  # how long a start waits for readers; they page in short transactions
_LOCK_SECONDS = 1.0  # `keybroker check` looks at the lock for an instant, and a dying broker needs one to let go
_FULL = 2


def lock(state: Path) -> int:
    """Take the directory for this process, making it if need be; the descriptor that holds the lock.

    Raises:
        StoreError: another broker has it, or it can never be written.
        StoreBrokenError: it cannot be written now.
    """
    with _as_store_errors(state):
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _take(descriptor, state)
        except BaseException:
            os.close(descriptor)
            raise
    return descriptor


def _take(descriptor: int, state: Path) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            if time.monotonic() > deadline:
                msg = f"{state}: another broker is running on this state; stop it, or name another `authority.state`"
                raise StoreError(msg) from err
            time.sleep(0.05)
        else:
            return


def is_locked(state: Path) -> bool:
    """Whether a broker runs on this state."""
    try:
        descriptor = os.open(state / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # there has been none, or not one of ours
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def writer(state: Path) -> sqlite3.Connection:
    """The one connection that writes, on a database that was brought to this format, settled and checked at its end.

    Raises:
        StoreError: not a database that may be used, or SQLite cannot keep its promise there.
        StoreBrokenError: it cannot be opened now.
    """
    path = state / DATABASE
    with _as_store_errors(state):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        _sync_names(state)
        db = sqlite3.connect(path, timeout=_SETTLE_MS / 1000, isolation_level=None, check_same_thread=False, cached_statements=64)
        try:
            schema.require_known(db, path)
            _require_promise(db, state)
            _sync_names(state)  # the write-ahead log has its name now, and nothing in it yet that counts on it
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA temp_store = MEMORY")  # what a statement of many rows may have to undo; there is no other place to write to
            db.execute("PRAGMA cache_size = -65536")  # KiB
            db.execute("PRAGMA wal_autocheckpoint = 0")  # SQLite's own checkpoint says nothing when its sync fails; ours does
            schema.migrate(db)
            _settle(db, state)
            tail.require_whole(db)
            db.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
        except BaseException as err:
            if not _is_sync_failure(err):  # closing would sync again: whoever catches that one ends the process at once
                db.close()
            raise
    return db


def reader(state: Path) -> sqlite3.Connection:
    """A connection that cannot write. Its statements are its transactions, so keep them short.

    Raises:
        StoreError, StoreBrokenError: it cannot be opened.
    """
    path = state / DATABASE
    with _as_store_errors(state):
        address = f"{path.absolute().as_uri()}?{'immutable=1' if _is_at_rest(state) else 'mode=ro'}"
        db = sqlite3.connect(address, uri=True, timeout=BUSY_MS / 1000, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA query_only = ON")
            schema.require_known(db, path)
        except BaseException:
            db.close()
            raise
    return db


def _is_at_rest(state: Path) -> bool:
    """Whether it is a copy on a read-only file system, with no log to be read along: SQLite has to be told that nobody writes there."""
    log = state / f"{DATABASE}-wal"
    return bool(os.statvfs(state).f_flag & os.ST_RDONLY) and not (log.exists() and log.stat().st_size)


def _require_promise(db: sqlite3.Connection, state: Path) -> None:
    """A commit must be on disk when it returns (sqlite.org/pragma.html#pragma_synchronous); see that SQLite is really set so."""
    if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
        msg = f"{state}: this file system cannot hold a database in WAL mode; use a local one"
        raise StoreError(msg)
    db.execute("SELECT count(*) FROM sqlite_schema").fetchone()  # now the log is there
    db.execute("PRAGMA synchronous = FULL")
    options = {row[0] for row in db.execute("PRAGMA compile_options")}
    if db.execute("PRAGMA synchronous").fetchone()[0] != _FULL or "NO_SYNC" in options:
        msg = "SQLite does not sync on commit; the record would not survive a power loss"
        raise StoreError(msg)


def _settle(db: sqlite3.Connection, state: Path) -> None:
    """All that is committed is in the database file and on disk, and the log is empty."""
    if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] != 0:
        msg = f"{state}: another process reads the database and does not end; see who has it open"
        raise StoreBrokenError(msg)
    pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
    if (state / DATABASE).stat().st_size < pages * size:
        msg = f"{state}: the database has been cut short; restore it, or name another `authority.state`"
        raise StoreError(msg)


def _sync_names(state: Path) -> None:
    """SQLite does this too, and says nothing when it fails: then the log's name would be lost with the power, and the log with it."""
    directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    except OSError as err:
        msg = f"{state}: the directory cannot be synced ({err.strerror})"
        raise StoreBrokenError(msg) from err
    finally:
        os.close(directory)


def _is_sync_failure(err: BaseException) -> bool:
    return isinstance(err, StoreBrokenError) or (isinstance(err, sqlite3.Error) and is_fatal(err))


@contextmanager
def _as_store_errors(state: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        if is_lasting(err):
            msg = f"{state}: {err.strerror}; the authority's user must be able to write there"
            raise StoreError(msg) from err
        msg = f"{state}: {err.strerror}"
        raise StoreBrokenError(msg) from err
    except sqlite3.Error as err:
        msg = f"the database in {state} cannot be opened ({name_of(err)})"
        database = state / DATABASE
        if is_lasting(err) or (database.exists() and not os.access(database, os.R_OK | os.W_OK)):
            msg += "; restore it, or name another `authority.state`"
            raise StoreError(msg) from err
        raise StoreBrokenError(msg) from err
