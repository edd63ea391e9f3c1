"""How the store fails, and what each failure means for the process that met it."""

from __future__ import annotations

import errno
import sqlite3

from keybroker.errors import AuditBusyError, AuditUnavailableError, KeyBrokerError, StoreError

# What starting again will not mend.
_LASTING_ERRNO = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
)
# SQLite opens for reading what it cannot open for writing, for whatever reason: "read-only" alone is not lasting.
_LASTING = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_PERM})
# What a failed sync means is unknown (the kernel may have dropped the pages), so nothing may be written after one.
_FATAL = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
_BUSY_PRIMARY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_FATAL_PRIMARY = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


class StoreBrokenError(StoreError):
    """The store failed in a way after which only a fresh start tells what is on disk. Starting again makes sense."""


class StoreConflictError(KeyBrokerError):
    """A record contradicts what is on record: a second outcome of a use, a second pin of a key version. Nothing was written."""


def is_fatal(err: sqlite3.Error) -> bool:
    """Whether the process must end without writing again."""
    code = _code(err)
    return code in _FATAL or code & 0xFF in _FATAL_PRIMARY


def is_lasting(err: OSError | sqlite3.Error) -> bool:
    """Whether a fresh start would meet the same failure, so that an operator has to look."""
    if isinstance(err, OSError):
        return err.errno in _LASTING_ERRNO
    return _code(err) & 0xFF in _LASTING


def unavailable(err: sqlite3.Error, detail: str) -> AuditUnavailableError:
    """What a caller is told of an error that may pass. SQLite has tried again by itself for as long as `busy_timeout` says."""
    kind = AuditBusyError if _code(err) & 0xFF in _BUSY_PRIMARY else AuditUnavailableError
    return kind(detail, retry_after=1)


def name_of(err: BaseException) -> str:
    """SQLite's name of an error; never its text, which may quote what was stored."""
    return str(getattr(err, "sqlite_errorname", type(err).__name__))


def _code(err: sqlite3.Error) -> int:
    return int(getattr(err, "sqlite_errorcode", sqlite3.SQLITE_ERROR))
