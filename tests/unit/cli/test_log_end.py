"""The newest records of a log, and what comes after them, by a broker in memory that records each look at it, as the real one does."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest

from keybroker.cli.log_end import LogEnd
from keybroker.client import BrokerUnreachableError, Client, Record, RecordPage, Whoami
from keybroker.clock import SystemClock, from_rfc3339, to_rfc3339
from keybroker.errors import DeniedError, KeyBrokerError, OverloadedError

AUDITOR = "spiffe://example.org/human/auditor"
WORKLOAD = "spiffe://example.org/payments/api"


class MemoryBroker:
    """Just the record.

    Attributes:
        reads: how often the record was looked at.
        skew_us: by which its clock is behind ours.
        failures: raised by the next looks, one each.
    """

    def __init__(self) -> None:
        self.records_: list[Record] = []
        self.reads = 0
        self.skew_us = 0
        self.failures: list[KeyBrokerError] = []
        self.page_bytes = 1_000

    def write(self, kind: str = "intent", trail: str = WORKLOAD, count: int = 1) -> None:
        now = to_rfc3339(SystemClock().now_us() - self.skew_us)
        first = len(self.records_)
        self.records_ += [Record(b"", {}, index, now, kind, trail, "", "", "") for index in range(first, first + count)]

    def whoami(self) -> Whoami:
        return Whoami(AUDITOR, "example.org", "", "", "")

    def records(self, *, cursor: str = "", limit: int = 100, **filters: str) -> RecordPage:
        if self.failures:
            raise self.failures.pop(0)
        self.reads += 1
        self.write("read", AUDITOR)
        after = int(cursor) if cursor else -1
        since = from_rfc3339(filters["since"]) if filters.get("since") else 0
        found = [
            record
            for record in self.records_[after + 1 :]
            if (not filters.get("kind") or record.kind == filters["kind"])
            and (not filters.get("workload") or record.trail == filters["workload"])
            and from_rfc3339(record.time) >= since
        ]
        limit = min(limit, self.page_bytes)
        return RecordPage(tuple(found[:limit]), str(found[limit - 1].index) if len(found) > limit else None)

    def iter_records(self, **filters: str) -> Any:
        cursor: str | None = ""
        while cursor is not None:
            page = self.records(**filters, cursor=cursor, limit=1_000)
            yield from page.records
            cursor = page.next


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def log_of(broker: MemoryBroker, sleep: Any = lambda _: None, **filters: str) -> LogEnd:
    return LogEnd(cast("Client", broker), cast("Any", filters), sleep)


def indexes(records: Any) -> list[int]:
    return [record.index for record in records]


@pytest.mark.parametrize("size", [10, 1_000, 30_000])
def test_newest_records_of_a_log_of_any_size_cost_two_looks(broker: MemoryBroker, size: int) -> None:
    broker.write(count=size)
    assert indexes(log_of(broker).newest(10)) == list(range(size - 10, size))
    assert broker.reads == 2


def test_newest_records_of_a_short_log_are_all_of_it(broker: MemoryBroker) -> None:
    broker.write(count=3)
    assert indexes(log_of(broker).newest(10)) == [0, 1, 2]
    assert indexes(log_of(broker).newest(0)) == []


def test_many_records_come_in_pages(broker: MemoryBroker) -> None:
    broker.write(count=5_000)
    assert indexes(log_of(broker).newest(2_500)) == list(range(2_500, 5_000))


def test_our_own_reads_are_left_out_unless_they_are_asked_for(broker: MemoryBroker) -> None:
    broker.write(count=50)
    broker.write("read", AUDITOR, count=2_000)
    broker.write("read", "spiffe://example.org/human/other")
    assert indexes(log_of(broker).newest(3)) == [48, 49, 2_050]
    newest = log_of(broker, kind="read").newest(3)
    assert {record.kind for record in newest} == {"read"}
    assert len(newest) == 3


def test_rare_records_are_looked_for_further_and_further_back(broker: MemoryBroker) -> None:
    broker.write("denial", count=3)
    broker.write(count=20_000)
    broker.write("denial")
    broker.write(count=5_000)
    assert indexes(log_of(broker, kind="denial").newest(2)) == [2, 20_003]
    assert broker.reads < 8


def test_nothing_that_matches_is_no_record(broker: MemoryBroker) -> None:
    broker.write(count=5)
    assert log_of(broker, kind="security").newest(10) == []


@pytest.mark.parametrize("minutes", [-600, -4, 4, 600])
def test_clocks_that_differ_do_not_hide_records(broker: MemoryBroker, minutes: int) -> None:
    broker.skew_us = minutes * 60_000_000
    broker.write(count=100)
    assert indexes(log_of(broker).newest(2)) == [98, 99]


def test_news_are_followed_without_a_gap_and_without_a_repetition(broker: MemoryBroker) -> None:
    broker.write(count=20)
    log = log_of(broker, lambda _: broker.write(count=3))
    newest = indexes(log.newest(5))
    broker.write(count=2)  # before the first look
    news = indexes(itertools.islice(log.following(), 30))
    expected = [record.index for record in broker.records_ if record.kind != "read"]
    assert newest + news == expected[15 : 15 + 35]


def test_looks_become_rarer_while_there_is_no_news_and_frequent_again_when_there_is(broker: MemoryBroker) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) in {8, 10}:
            broker.write()

    following = log_of(broker, sleep).following()
    next(following)
    next(following)
    assert pauses == [1, 2, 4, 8, 10, 10, 10, 10, 1, 2]


def test_an_hour_without_news_is_fewer_than_four_hundred_looks(broker: MemoryBroker) -> None:
    waited = 0.0

    def sleep(seconds: float) -> None:
        nonlocal waited
        waited += seconds
        if waited > 3_600:
            raise KeyboardInterrupt

    log = log_of(broker, sleep, kind="denial")
    broker.records_ = []
    with pytest.raises(KeyboardInterrupt):
        next(log.following())
    assert 300 < broker.reads < 400


def test_outage_is_told_and_waited_out(broker: MemoryBroker, capsys: pytest.CaptureFixture[str]) -> None:
    broker.write()
    log = log_of(broker)
    assert indexes(log.newest(1)) == [0]
    broker.failures = [BrokerUnreachableError("gone"), OverloadedError("busy", retry_after=1)]
    broker.write()
    assert next(log.following()).kind == "intent"
    assert capsys.readouterr().err.splitlines() == ["still following: gone", "still following: busy"]


def test_refusal_ends_it(broker: MemoryBroker) -> None:
    broker.failures = [DeniedError("no longer")]
    with pytest.raises(DeniedError):
        next(log_of(broker).following())


def test_heads_records_are_left_out_and_do_not_keep_us_looking(broker: MemoryBroker) -> None:
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        broker.write("heads", "")
        if len(pauses) == 5:
            broker.write("denial")

    broker.write(count=3)
    broker.write("heads", "")
    log = log_of(broker, sleep)
    assert [record.kind for record in log.newest(9)] == ["intent"] * 3
    assert next(log.following()).kind == "denial"
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0]
    assert {record.kind for record in log_of(broker, kind="heads").newest(9)} == {"heads"}
