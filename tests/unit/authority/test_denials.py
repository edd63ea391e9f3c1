"""Denials: each on record, until there are so many that they are counted."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from keybroker.authority.denials import RECORDS_PER_WINDOW
from keybroker.errors import AuditUnavailableError, DeniedError, NotFoundError
from keybroker.model.call import Sign
from keybroker.model.decision import NO_GRANT, Verdict
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, asker_of, fake_broker, svid_of
from tests.unit.authority.test_journal import FailingDatabase

BODY = SignBody(algorithm=Algorithm.ES256, message=b"x")
OTHER = "spiffe://example.org/ci/release"


def with_broker(tmp_path: Path, test: Callable[[FakeBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, (NO_GRANT,)
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


@contextlib.contextmanager
def full_disk(broker: FakeBroker) -> Iterator[None]:
    real = broker.store._db
    broker.store._db = FailingDatabase(real, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")  # type: ignore[assignment]  # in its shape
    yield
    broker.store._db = real


async def deny(broker: FakeBroker, times: int, key: str = "orders") -> None:
    for number in range(times):
        with pytest.raises(NotFoundError):
            await broker.service.sign(broker.asker, Sign(f"{key}{number}", BODY))


@pytest.mark.case(77)
def test_flood_of_denials_is_a_few_records_that_count_them_all(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await deny(broker, 500)
        assert len(broker.records()) == RECORDS_PER_WINDOW
        await broker.denials.flush()
        records = broker.records()
        assert len(records) == RECORDS_PER_WINDOW + 1
        assert {record["kind"] for record in records} == {"denial"}
        assert sum(record["body"]["count"] for record in records) == 500
        assert records[-1]["request"]["target"]["id"] == f"orders{RECORDS_PER_WINDOW}"  # the first of those that are counted

    with_broker(tmp_path, test)


def test_denials_are_records_of_their_own_again_when_the_second_is_over(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await deny(broker, RECORDS_PER_WINDOW)
        await broker.denials.flush()
        await deny(broker, RECORDS_PER_WINDOW)
        assert [record["body"]["count"] for record in broker.records()] == [1] * (2 * RECORDS_PER_WINDOW)

    with_broker(tmp_path, test)


def test_flood_by_one_caller_takes_nothing_from_another(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await deny(broker, RECORDS_PER_WINDOW + 5)
        with pytest.raises(NotFoundError):
            await broker.service.sign(asker_of(svid_of(OTHER)), Sign("orders", BODY))
        assert broker.records()[-1]["trail"]["id"] == OTHER

    with_broker(tmp_path, test)


def test_counts_are_kept_by_problem_code(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await deny(broker, RECORDS_PER_WINDOW + 2)
        broker.rules.engine.reasons = ("algorithm-not-granted",)
        for _ in range(3):
            with pytest.raises(DeniedError):
                await broker.service.sign(broker.asker, Sign("orders", BODY))
        await broker.denials.flush()
        assert [(record["body"]["code"], record["body"]["count"]) for record in broker.records()[-2:]] == [("not-found", 2), ("denied", 3)]

    with_broker(tmp_path, test)


def test_denial_is_not_answered_as_one_when_it_cannot_be_recorded(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        with full_disk(broker), pytest.raises(AuditUnavailableError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))

    with_broker(tmp_path, test)


def test_count_is_kept_when_it_cannot_be_written_and_grows_until_it_can(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await deny(broker, RECORDS_PER_WINDOW + 5)
        with full_disk(broker), pytest.raises(AuditUnavailableError):
            await broker.denials.flush()
        await deny(broker, RECORDS_PER_WINDOW + 3)
        await broker.denials.flush()
        assert broker.records()[-1]["body"]["count"] == 8

    with_broker(tmp_path, test)
