"""What a store is opened as, what is refused, and what only makes sense to try again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from keybroker.authority.store import opening, tail
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.opening import DATABASE
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.errors import StoreError
from tests.unit.authority.store.logs import SIZE, tampering, whole


def pragma(db: sqlite3.Connection, name: str) -> object:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


def reopened(state: Path) -> int:
    """Open and close; how many records there are."""
    store = SqliteStore.open(state)
    try:
        return store.tail().size
    finally:
        store.close()


def is_lasting(state: Path) -> bool:
    """Whether opening fails in a way that starting again does not mend."""
    with pytest.raises(StoreError) as caught:
        SqliteStore.open(state)
    return not isinstance(caught.value, StoreBrokenError)


@pytest.mark.case(61)
def test_store_is_opened_so_that_a_commit_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    db = opening.writer(tmp_path)
    assert pragma(db, "journal_mode") == "wal"
    assert pragma(db, "synchronous") == 2
    assert pragma(db, "wal_autocheckpoint") == 0
    assert pragma(db, "busy_timeout") == opening.BUSY_MS
    assert pragma(db, "foreign_keys") == 1
    assert pragma(db, "temp_store") == 2  # memory: the room may write nowhere but to its state
    assert (tmp_path / DATABASE).stat().st_mode & 0o777 == 0o600
    db.close()


class PretendingConnection(sqlite3.Connection):
    """SQLite where one setting cannot be changed, or says something else of how it was built."""

    setting = ""
    build = ""

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if self.setting and statement.startswith(f"PRAGMA {self.setting} ="):
            return super().execute(f"PRAGMA {self.setting}")
        if self.build and statement == "PRAGMA compile_options":
            return super().execute("SELECT ?", (self.build,))
        return super().execute(statement, *values)


@pytest.mark.case(61)
@pytest.mark.parametrize(
    ("before", "setting", "build", "words"),
    [
        ("PRAGMA journal_mode = DELETE", "journal_mode", "", "cannot hold a database in WAL mode"),
        ("PRAGMA synchronous = NORMAL", "synchronous", "", "does not sync on commit"),
        ("PRAGMA synchronous = OFF", "synchronous", "", "does not sync on commit"),
        ("PRAGMA synchronous = FULL", "", "NO_SYNC", "does not sync on commit"),
    ],
)
def test_store_is_refused_where_sqlite_cannot_keep_its_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, setting: str, build: str, words: str
) -> None:
    monkeypatch.setattr(PretendingConnection, "setting", setting)
    monkeypatch.setattr(PretendingConnection, "build", build)
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE, factory=PretendingConnection, isolation_level=None)) as db:
        db.execute(before.replace("PRAGMA", "PRAGMA "))
        with pytest.raises(StoreError, match=words) as caught:
            opening._require_promise(db, tmp_path)
    assert not isinstance(caught.value, StoreBrokenError)


@pytest.mark.case(61)
def test_memory_is_refused_as_a_place_for_the_record(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(":memory:")) as db, pytest.raises(StoreError, match="WAL mode"):
        opening._require_promise(db, tmp_path)


@pytest.mark.case(61)
@pytest.mark.parametrize(
    "content", [b"this is no database, and long enough for one to be sure of it" * 40, b"SQLite format 3\0" + b"\0" * 5_000]
)
def test_file_that_is_no_database_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE).write_bytes(content)
    assert is_lasting(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == content


@pytest.mark.case(61)
def test_database_of_another_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    with tampering(tmp_path) as db:
        db.execute("CREATE TABLE contacts (name TEXT)")
    with pytest.raises(StoreError, match="not keybroker's"):
        SqliteStore.open(tmp_path)
    with tampering(tmp_path) as db:
        db.execute("PRAGMA user_version = 1")
    with pytest.raises(StoreError, match="not keybroker's"):
        SqliteStore.open(tmp_path)
    with tampering(tmp_path) as db:
        assert [row[0] for row in db.execute("SELECT name FROM sqlite_schema")] == ["contacts"]


@pytest.mark.case(78)
def test_database_of_a_newer_format_is_refused_by_writer_and_reader(tmp_path: Path) -> None:
    with tampering(whole(tmp_path)) as db:
        db.execute("PRAGMA user_version = 999")
    with pytest.raises(StoreError, match="newer keybroker"):
        SqliteStore.open(tmp_path)
    with pytest.raises(StoreError, match="newer keybroker"):
        opening.reader(tmp_path)


@pytest.mark.case(61)
@pytest.mark.parametrize("kept", [0.95, 0.5, 0.1])
def test_truncated_database_is_refused(tmp_path: Path, kept: float) -> None:
    reopened(whole(tmp_path))
    path = tmp_path / DATABASE
    os.truncate(path, int(path.stat().st_size * kept))
    assert is_lasting(tmp_path)


@pytest.mark.case(68)
@pytest.mark.case(71)
@pytest.mark.parametrize(
    ("statement", "index", "rule"),
    [
        ("UPDATE record SET leaf = CAST(replace(CAST(leaf AS TEXT), 'denied', 'denies') AS BLOB) WHERE idx = 12", 12, "wrong-hash"),
        ("UPDATE record SET leaf = X'5B5D' WHERE idx = 7", 7, "not-json"),
        ("UPDATE record SET leaf = X'7B7D20' WHERE idx = 7", 7, "not-canonical"),
        ("UPDATE record SET outcome = 'failed' WHERE idx = 7", 7, "column-outcome"),
        ("UPDATE record SET use = 'other' WHERE idx = 13", 13, "column-use"),
        ("DELETE FROM record WHERE idx = 6", 7, "missing-record"),
        ("UPDATE record SET hash = zeroblob(32), leaf = leaf WHERE idx = 2", 2, "wrong-hash"),
    ],
)
def test_broker_refuses_to_go_on_after_a_damaged_record_near_the_end(tmp_path: Path, statement: str, index: int, rule: str) -> None:
    with tampering(whole(tmp_path)) as db:
        assert db.execute(statement).rowcount == 1
    with pytest.raises(StoreError, match=rf"damaged at index {index} \({rule}\)") as caught:
        SqliteStore.open(tmp_path)
    assert not isinstance(caught.value, StoreBrokenError)


def test_only_the_end_is_looked_at_and_a_trail_that_goes_further_back_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "RECORDS", 3)  # 11, 12, 13: the records before them in their trails are 7 and 11
    with tampering(whole(tmp_path)) as db:
        db.execute("UPDATE record SET outcome = 'failed' WHERE idx = 5")
    assert reopened(tmp_path) == SIZE
    with tampering(tmp_path) as db:
        db.execute("UPDATE record SET hash = zeroblob(32) WHERE idx = 9")
    with pytest.raises(StoreError, match=r"index 12 \(trail-previous\)"):
        SqliteStore.open(tmp_path)


@pytest.mark.case(63)
def test_everything_in_the_log_of_a_crashed_broker_is_in_the_database_before_anything_new_is_written(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    whole(before)
    with tampering(before) as db:  # as long as somebody has it open, nothing is moved out of the log
        db.execute("BEGIN")
        db.execute("SELECT * FROM trail").fetchall()
        store = SqliteStore(opening_without_settling(before), opening.lock(before))
        with store.transaction():
            store.claim_idempotency(b"scope", b"body", "use-0", 0)
        shutil.copytree(before, after)  # what a power loss leaves
        store.close()
        db.execute("COMMIT")
    assert (after / f"{DATABASE}-wal").stat().st_size > 0
    store = SqliteStore.open(after)
    assert (after / f"{DATABASE}-wal").stat().st_size == 0
    with contextlib.closing(sqlite3.connect(f"file:{after / DATABASE}?immutable=1", uri=True)) as alone:  # the file without its log
        assert alone.execute("SELECT use FROM idempotency WHERE scope = ?", (b"scope",)).fetchone() == ("use-0",)
    store.close()


def opening_without_settling(state: Path) -> sqlite3.Connection:
    return sqlite3.connect(state / DATABASE, isolation_level=None)


def test_start_waits_for_a_reader_and_then_says_that_it_may_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_SETTLE_MS", 50)
    whole(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / DATABASE, isolation_level=None)) as db:
        db.execute("INSERT INTO idempotency VALUES (X'00', X'00', 'use-0', 0, NULL)")
        db.execute("BEGIN")
        db.execute("SELECT * FROM trail").fetchall()
        assert not is_lasting(tmp_path)
        db.execute("COMMIT")
        assert reopened(tmp_path) == SIZE


@pytest.mark.case(67)
def test_lock_is_waited_for_an_instant_and_refused_after_it(tmp_path: Path) -> None:
    held = opening.lock(tmp_path)
    assert opening.is_locked(tmp_path)
    threading.Timer(0.2, os.close, (held,)).start()
    second = opening.lock(tmp_path)  # `keybroker check` looked, or a broker was just ending
    with pytest.raises(StoreError, match="another broker is running"):
        opening.lock(tmp_path)
    os.close(second)
    assert not opening.is_locked(tmp_path)
    assert not opening.is_locked(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.EACCES, True), (errno.EROFS, True), (errno.ENOTDIR, True), (errno.EIO, False), (errno.ENOSPC, False), (errno.EMFILE, False)],
)
def test_failure_of_the_system_is_lasting_or_passing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, *, lasting: bool
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)
    assert is_lasting(tmp_path) is lasting


def test_state_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert is_lasting(tmp_path / "state")


def test_start_does_not_take_longer_with_a_longer_log(tmp_path: Path) -> None:
    whole(tmp_path)
    with tampering(tmp_path) as db:
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute("BEGIN")
        db.executemany("INSERT INTO idempotency VALUES (?, X'00', 'use-0', 0, NULL)", ((b"%d" % number,) for number in range(50_000)))
        db.execute("COMMIT")
    started = time.monotonic()
    assert reopened(tmp_path) == SIZE
    assert time.monotonic() - started < 10
