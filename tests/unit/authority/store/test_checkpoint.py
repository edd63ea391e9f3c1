"""The write-ahead log is moved into the database now and then; its failures are passing, but for those of a sync."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from keybroker.authority.store import sqlite
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.opening import DATABASE
from tests.unit.authority.store.logs import intent, journal_on, outcome
from tests.unit.authority.test_journal import FailingDatabase


def log_bytes(state: Path) -> int:
    return (state / f"{DATABASE}-wal").stat().st_size


def test_log_stays_short_however_much_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "CHECKPOINT_FRAMES", 50)

    async def main() -> None:
        async with journal_on(tmp_path) as (journal, _):
            for number in range(100):
                await journal.write(intent(f"u{number}"))
                await journal.write(outcome(f"u{number}"))
            assert log_bytes(tmp_path) < 150 * 4096  # about 1,200 frames were written
            assert (tmp_path / DATABASE).stat().st_size > 100_000

    asyncio.run(main())


def test_nothing_is_moved_before_the_log_is_long_enough(tmp_path: Path) -> None:
    async def main() -> None:
        async with journal_on(tmp_path) as (journal, _):
            before = (tmp_path / DATABASE).stat().st_size
            for number in range(20):
                await journal.write(intent(f"u{number}"))
            assert (tmp_path / DATABASE).stat().st_size == before

    asyncio.run(main())


@pytest.mark.case(56)
@pytest.mark.parametrize(
    ("code", "name", "is_fatal"),
    [
        (sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE", False),
        (sqlite3.SQLITE_FULL, "SQLITE_FULL", False),
        (sqlite3.SQLITE_IOERR_TRUNCATE, "SQLITE_IOERR_TRUNCATE", False),
        (sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC", True),
        (sqlite3.SQLITE_CORRUPT, "SQLITE_CORRUPT", True),
        (sqlite3.SQLITE_CORRUPT_INDEX, "SQLITE_CORRUPT_INDEX", True),
    ],
)
def test_failed_sync_of_a_checkpoint_ends_the_process_and_other_failures_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, name: str, *, is_fatal: bool
) -> None:
    monkeypatch.setattr(sqlite, "CHECKPOINT_FRAMES", 1)
    broken: list[StoreBrokenError] = []

    async def main() -> None:
        async with journal_on(tmp_path, on_broken=broken.append) as (journal, store):
            real = store._db
            store._db = FailingDatabase(real, "PRAGMA wal_checkpoint", code, name)  # type: ignore[assignment]  # in its shape
            assert await journal.write(intent("u")) == 0  # durable all the same
            if is_fatal:
                for _ in range(500):
                    await asyncio.sleep(0 if broken else 0.01)
            else:
                assert await journal.write(outcome("u")) == 1
                assert journal.is_writable
            store._db = real

    asyncio.run(main())
    assert bool(broken) is is_fatal
