"""The journal: durable before it says so, alone or in a group, across a restart, and nothing after a broken store."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.audit.chain import check
from keybroker.authority import journal as journal_module
from keybroker.authority.journal import Entry, StaleGenerationError
from keybroker.authority.store.faults import StoreBrokenError
from keybroker.authority.store.sqlite import Pin, SqliteStore
from keybroker.errors import AuditUnavailableError, StoreError
from keybroker.model.record import Draft, Outcome, RecordKind
from tests.brokers import fake_broker, read_leaves

A, B = "spiffe://example.org/a", "spiffe://example.org/b"


def intent(use: str, trail: str = A) -> Entry:
    return Entry(Draft(kind=RecordKind.INTENT, trail=trail, use=use))


def outcome(use: str, trail: str = A) -> Entry:
    return Entry(Draft(kind=RecordKind.OUTCOME, trail=trail, use=use, outcome=Outcome.SIGNED))


class FailingDatabase:
    """A connection that fails one statement, as SQLite reports it."""

    def __init__(self, real: sqlite3.Connection, statement: str, code: int, name: str, spared: int = 0) -> None:
        self._real = real
        self._spared = spared
        self._statement = statement
        self._error = sqlite3.OperationalError(name)
        self._error.sqlite_errorcode = code
        self._error.sqlite_errorname = name

    @property
    def in_transaction(self) -> bool:
        return self._real.in_transaction

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._fail(statement)
        return self._real.execute(statement, *values)

    def executemany(self, statement: str, *values: Any) -> sqlite3.Cursor:
        self._fail(statement)
        return self._real.executemany(statement, *values)

    def _fail(self, statement: str) -> None:
        if statement.startswith(self._statement):
            if self._spared == 0:
                raise self._error
            self._spared -= 1

    def close(self) -> None:
        self._real.close()


async def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(500):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come true in time")


def test_record_is_durable_when_write_returns(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            assert await broker.journal.write(intent("u1")) == 0
            assert len(read_leaves(tmp_path)) == 1  # another connection sees it
            assert await broker.journal.write(outcome("u1")) == 1

    asyncio.run(main())
    assert check(read_leaves(tmp_path)) == []


@pytest.mark.case(64)
def test_concurrent_writes_to_few_trails_make_one_chain_each(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            indexes = await asyncio.gather(*(broker.journal.write(intent(f"u{n}", (A, B)[n % 2])) for n in range(300)))
            assert sorted(indexes) == list(range(300))
            assert broker.faults() == []

    asyncio.run(main())


def test_chains_go_on_after_a_restart(tmp_path: Path) -> None:
    async def main(first: int) -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.close_open_uses()
            for number in range(first, first + 3):
                await broker.journal.write(intent(f"u{number}"))
                await broker.journal.write(outcome(f"u{number}"))

    asyncio.run(main(0))
    asyncio.run(main(3))
    assert check(read_leaves(tmp_path)) == []
    assert len(read_leaves(tmp_path)) == 12


@pytest.mark.case(55)
def test_intent_without_outcome_is_closed_as_unknown_at_the_next_start(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("lost"))
            await broker.journal.write(intent("done"))
            await broker.journal.write(outcome("done"))
        async with fake_broker(tmp_path) as broker:
            assert await broker.journal.close_open_uses() == 1
            last = broker.records()[-1]
            assert (last["use"], last["outcome"], last["trail"]["id"]) == ("lost", "unknown", A)
            assert await broker.journal.close_open_uses() == 0
            assert broker.faults() == []

    asyncio.run(main())


def test_entry_of_an_older_generation_is_refused_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            stale = Entry(Draft(kind=RecordKind.INTENT, trail=A, use="stale"), generation=broker.generation.number)
            broker.generation.advance()
            good = Entry(Draft(kind=RecordKind.INTENT, trail=A, use="good"), generation=broker.generation.number)
            results = await asyncio.gather(broker.journal.write(stale), broker.journal.write(good), return_exceptions=True)
            assert isinstance(results[0], StaleGenerationError)
            assert results[1] == 0
            assert [record["use"] for record in broker.records()] == ["good"]

    asyncio.run(main())


def test_entry_too_large_is_refused_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            huge = Entry(Draft(kind=RecordKind.READ, trail=A, body={"text": "x" * 70_000}))
            results = await asyncio.gather(broker.journal.write(huge), broker.journal.write(intent("u")), return_exceptions=True)
            assert isinstance(results[0], AuditUnavailableError)
            assert results[1] == 0
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.parametrize("count", [1, 3, 22, 85, 150])
def test_records_of_one_commit_are_all_there_in_order_however_many(tmp_path: Path, count: int) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            uses = [f"u{number}" for number in range(count)]
            await broker.journal.write(intent("first"))
            assert await asyncio.gather(*(broker.journal.write(intent(use)) for use in uses)) == list(range(1, count + 1))
            assert {use for use, _ in broker.store.open_uses()} == {"first", *uses}
            await asyncio.gather(*(broker.journal.write(outcome(use)) for use in uses))
            assert [use for use, _ in broker.store.open_uses()] == ["first"]
            assert [record["use"] for record in broker.records()] == ["first", *uses, *uses]
            assert broker.faults() == []

    asyncio.run(main())


def test_intent_that_is_there_twice_leaves_nothing_of_its_statement_behind(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u0"))
            uses = [f"u{number}" for number in (*range(1, 40), 0)]
            results = await asyncio.gather(*(broker.journal.write(intent(use)) for use in uses), return_exceptions=True)
            assert isinstance(results.pop(), AuditUnavailableError)
            assert results == list(range(1, 40))
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.case(39)
def test_record_time_never_goes_back_when_the_clock_does(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u1"))
            broker.clock.time_us -= 3_600_000_000
            await broker.journal.write(intent("u2"))
            first, second = (record["time"] for record in broker.records())
            assert first == second
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.case(56)
@pytest.mark.case(58)
@pytest.mark.parametrize("statement", ["BEGIN", "INSERT INTO record", "INSERT INTO open_use", "COMMIT"])
@pytest.mark.parametrize(("code", "name"), [(sqlite3.SQLITE_FULL, "SQLITE_FULL"), (sqlite3.SQLITE_IOERR_WRITE, "SQLITE_IOERR_WRITE")])
def test_failed_write_refuses_the_group_and_the_next_succeeds(tmp_path: Path, statement: str, code: int, name: str) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("before"))
            real = broker.store._db
            broker.store._db = FailingDatabase(real, statement, code, name)  # type: ignore[assignment]  # in its shape
            results = await asyncio.gather(broker.journal.write(intent("a")), broker.journal.write(intent("b", B)), return_exceptions=True)
            assert all(isinstance(result, AuditUnavailableError) for result in results)
            states = [broker.journal.is_writable]
            broker.store._db = real
            assert await broker.journal.write(intent("after", B)) == 2
            assert broker.records()[1]["body"] == {"event": "record-not-writable", "detail": name, "count": 2}
            assert [*states, broker.journal.is_writable] == [False, True]
            assert broker.broken == []
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.case(56)
def test_failed_sync_ends_the_process_and_nothing_is_written_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            real = broker.store._db
            broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_IOERR_FSYNC, "SQLITE_IOERR_FSYNC")  # type: ignore[assignment]
            with pytest.raises(AuditUnavailableError):
                await broker.journal.write(intent("u"))
            assert [type(err) for err in broker.broken] == [StoreBrokenError]

    asyncio.run(main())


def test_owed_outcome_goes_first_when_writing_works_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            real = broker.store._db
            broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")  # type: ignore[assignment]
            broker.journal.owe(outcome("u"))
            with pytest.raises(AuditUnavailableError):
                await broker.journal.write(intent("v"))
            broker.store._db = real
            assert await broker.journal.write(intent("w")) == 3
            assert [record["use"] or record["kind"] for record in broker.records()] == ["u", "u", "security", "w"]
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.case(57)
@pytest.mark.parametrize("is_owed", [False, True])
def test_journal_finds_out_by_itself_that_writing_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_owed: bool) -> None:
    monkeypatch.setattr(journal_module, "RETRY_SECONDS", 0.02)

    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            real = broker.store._db
            broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")  # type: ignore[assignment]
            for entry in (outcome("u"), intent("v")):
                with pytest.raises(AuditUnavailableError):
                    await broker.journal.write(entry)
            if is_owed:
                broker.journal.owe(outcome("u"))
            await asyncio.sleep(0.1)
            assert not broker.journal.is_writable
            broker.store._db = real
            await wait_until(lambda: broker.journal.is_writable)
            kinds = [record["outcome"] or record["kind"] for record in broker.records()]
            assert kinds == ["intent", "signed", "security"] if is_owed else ["intent", "security"]
            assert broker.records()[-1]["body"] == {"event": "record-not-writable", "detail": "SQLITE_FULL", "count": 2}
            await asyncio.sleep(0.1)
            assert broker.journal.size == len(kinds)  # and then it is quiet

    asyncio.run(main())


def test_owed_outcome_of_a_use_that_was_closed_meanwhile_is_dropped_and_stops_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            await broker.journal.write(outcome("u"))
            broker.journal.owe(outcome("u"))
            broker.journal.owe(outcome("never began"))
            assert await broker.journal.write(intent("v")) == 2
            assert await broker.journal.write(outcome("v")) == 3
            assert broker.journal.is_writable
            assert broker.faults() == []

    asyncio.run(main())


def test_owed_outcome_is_written_at_an_orderly_end(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            broker.journal.owe(outcome("u"))

    asyncio.run(main())
    assert [leaf.count(b'"outcome":"signed"') for leaf in read_leaves(tmp_path)] == [0, 1]


@pytest.mark.parametrize("is_late", [False, True], ids=["use is open", "use is closed"])
def test_entry_that_contradicts_the_record_is_refused_alone(tmp_path: Path, *, is_late: bool) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            pin = Pin("k", 1, "ec-p256", b"spki", 0)
            await broker.journal.write(Entry(Draft(kind=RecordKind.ADMIN), pin=pin))
            await broker.journal.write(intent("u"))
            if is_late:
                await broker.journal.write(outcome("u"))
            before = broker.journal.size
            broker.journal.owe(outcome("nobody's"))
            results = await asyncio.gather(
                broker.journal.write(intent("a")),
                broker.journal.write(intent("u", B)),
                broker.journal.write(outcome("unheard of")),
                broker.journal.write(Entry(Draft(kind=RecordKind.ADMIN), pin=pin)),
                broker.journal.write(intent("b", B)),
                return_exceptions=True,
            )
            assert [type(result) for result in results] == [int, AuditUnavailableError, AuditUnavailableError, AuditUnavailableError, int]
            assert (results[0], results[4]) == (before, before + 1)
            assert broker.journal.is_writable
            assert broker.faults() == []
            assert broker.broken == []

    asyncio.run(main())


def test_entry_that_has_no_bytes_is_refused_alone_and_not_owed_for_ever(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            impossible = Entry(Draft(kind=RecordKind.READ, trail=A, body={"what": object()}))
            broker.journal.owe(impossible)
            results = await asyncio.gather(*map(broker.journal.write, (intent("a"), impossible, intent("b"))), return_exceptions=True)
            assert [type(result) for result in results] == [int, AuditUnavailableError, int]
            assert await broker.journal.write(intent("c")) == 2
            assert broker.faults() == []

    asyncio.run(main())


def test_entries_apart_share_the_fate_of_the_disk(tmp_path: Path) -> None:
    """The disk fills up while a group is written one by one: what is on record is answered so, and the rest is refused."""

    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            real = broker.store._db
            broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL", spared=1)  # type: ignore[assignment]
            writes = (broker.journal.write(intent(use)) for use in ("a", "u", "b"))
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert [type(result) for result in results] == [int, AuditUnavailableError, AuditUnavailableError]
            assert not broker.journal.is_writable
            broker.store._db = real
            assert await broker.journal.write(intent("c")) == 3
            assert [record["use"] or record["body"]["count"] for record in broker.records()] == ["u", "a", 1, "c"]
            assert broker.faults() == []

    asyncio.run(main())


def test_write_after_the_end_is_refused_and_hangs_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            broker.journal._convoy.close()
            with pytest.raises(AuditUnavailableError, match="stopping"):
                await asyncio.wait_for(broker.journal.write(intent("u")), 5)

    asyncio.run(main())


@pytest.mark.case(67)
def test_second_broker_on_the_same_state_is_refused(tmp_path: Path) -> None:
    first = SqliteStore.open(tmp_path)
    with pytest.raises(StoreError, match="another broker is running"):
        SqliteStore.open(tmp_path)
    first.close()
    SqliteStore.open(tmp_path).close()


@pytest.mark.case(78)
def test_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    SqliteStore.open(tmp_path).close()
    with sqlite3.connect(tmp_path / "keybroker.db") as db:
        db.execute("PRAGMA user_version = 999")
    db.close()
    with pytest.raises(StoreError, match="newer keybroker"):
        SqliteStore.open(tmp_path)


def test_store_refuses_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "keybroker.db").write_bytes(b"this is not a database, and long enough to be sure of it" * 40)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteStore.open(tmp_path)


@pytest.mark.case(61)
def test_store_syncs_on_commit_and_uses_a_write_ahead_log(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


def test_store_cannot_hold_two_outcomes_of_one_use_or_a_forked_chain(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await broker.journal.write(intent("u"))
            await broker.journal.write(outcome("u"))
            with pytest.raises(AuditUnavailableError):
                await broker.journal.write(outcome("u"))
            broker.journal._heads.clear()  # as if it had forgotten where the chain ends: it finds it again
            await broker.journal.write(intent("v"))
            assert broker.faults() == []

    asyncio.run(main())
