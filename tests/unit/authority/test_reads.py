"""What a caller may read, and that reading the record is itself on record."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from keybroker.authority.store.reader import Reader, RecordFilter
from keybroker.clock import from_rfc3339
from keybroker.errors import DeniedError, InvalidError, NotFoundError, PolicyFailedError, PolicyUnavailableError
from keybroker.model.call import QueryRecords, ShowKey, ShowRecord, Sign
from keybroker.model.decision import Decision, PolicyInput, Verdict
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, FakeEngine, asker_of, fake_broker, svid_of

OWN = "spiffe://example.org/payments/api"
OTHER = "spiffe://example.org/ci/release"


class TrailEngine(FakeEngine):
    """Lets a caller read the trails that a test names; an empty name is the whole record."""

    def __init__(self, *trails: str) -> None:
        super().__init__()
        self.trails = trails

    async def decide(self, request: bytes) -> Decision:
        asked = msgspec.json.decode(request, type=PolicyInput)
        if asked.operation == "read-audit" and self.verdict is not Verdict.FAILED:
            self.verdict = Verdict.ALLOW if asked.target.workload in self.trails else Verdict.DENY
        return await super().decide(request)


def with_broker(tmp_path: Path, test: Callable[[FakeBroker], Awaitable[None]]) -> None:
    """A broker on which two workloads have signed twice each."""

    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            for number in range(4):
                broker.clock.time_us += 1_000_000
                asker = asker_of(svid_of((OWN, OTHER)[number % 2]))
                await broker.service.sign(asker, Sign("orders", SignBody(algorithm=Algorithm.ES256, message=b"x")))
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


def trails(leaves: tuple[bytes, ...]) -> set[str]:
    return {msgspec.json.decode(leaf)["trail"]["id"] for leaf in leaves}


def test_auditor_reads_everything_in_pages_and_the_reads_are_on_record(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("")
        first = await broker.reads.query_records(broker.asker, QueryRecords(limit=5))
        assert len(first.records) == 5
        rest = await broker.reads.query_records(broker.asker, QueryRecords(cursor=first.next, kind="outcome"))
        assert trails(first.records) == {OWN, OTHER}
        assert len(rest.records) == 2
        assert rest.next == ""
        assert broker.kinds()[-2:] == ["read", "read"]

    with_broker(tmp_path, test)


def test_workload_reads_its_own_trail_and_nothing_else(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine(OWN)
        page = await broker.reads.query_records(broker.asker, QueryRecords())
        assert trails(page.records) == {OWN}
        assert len(page.records) == 5  # four of two uses, and the record of this very read
        with pytest.raises(DeniedError):
            await broker.reads.query_records(broker.asker, QueryRecords(workload=OTHER))
        assert broker.kinds()[-1] == "denial"
        own = await broker.reads.show_record(broker.asker, ShowRecord(0))
        assert trails(own.records) == {OWN}
        for index in (2, 99):
            with pytest.raises(NotFoundError):
                await broker.reads.show_record(broker.asker, ShowRecord(index))

    with_broker(tmp_path, test)


def test_nothing_is_read_when_rules_cannot_decide(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.verdict = Verdict.FAILED
        for reason, error in (("policy-error", PolicyFailedError), ("policy-unavailable", PolicyUnavailableError)):
            broker.rules.engine.reasons = (reason,)
            for read in (
                broker.reads.query_records(broker.asker, QueryRecords()),
                broker.reads.show_record(broker.asker, ShowRecord(0)),
                broker.reads.show_key(broker.asker, ShowKey("orders")),
                broker.reads.show_key(broker.asker, ShowKey("absent")),
                broker.reads.list_keys(broker.asker),
                broker.reads.whoami(broker.asker),
            ):
                before = len(broker.leaves())
                with pytest.raises(error):  # an outage, and not "you have nothing"
                    await read
                assert [each["body"]["code"] for each in broker.records()[before:]] == [reason]

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (QueryRecords(key="orders"), 8),
        (QueryRecords(key="nothing"), 0),
        (QueryRecords(kind="intent"), 4),
        (QueryRecords(outcome="signed", workload=OTHER), 2),
        (QueryRecords(principal="alice"), 0),
        (QueryRecords(limit=3), 3),
        (QueryRecords(workload="spiffe://example.org/ci/*"), 4),
        (QueryRecords(workload="spiffe://example.org/**", kind="intent"), 4),
        (QueryRecords(workload="spiffe://example.org/*"), 0),
        (QueryRecords(key="orders", key_version=1), 8),
        (QueryRecords(key="orders", key_version=2), 0),
        (QueryRecords(algorithm="ES256"), 4),
        (QueryRecords(algorithm="PS256"), 0),
        (QueryRecords(address="192.0.2.99"), 0),
        (QueryRecords(svid="FF"), 0),
        (QueryRecords(grant="nobody"), 0),
        (QueryRecords(content="a=b"), 0),
    ],
)
def test_filters_narrow_the_page(tmp_path: Path, wanted: QueryRecords, count: int) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("", OTHER)
        assert len((await broker.reads.query_records(broker.asker, wanted)).records) == count

    with_broker(tmp_path, test)


def test_filters_that_were_asked_are_on_record_and_no_others(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("", OTHER)
        asked = QueryRecords(workload=OTHER, principal="alice", outcome="signed", since_us=1_764_000_000_000_000, cursor="7")
        await broker.reads.query_records(broker.asker, asked)
        given = {"workload": OTHER, "principal": "alice", "outcome": "signed", "since": "2025-11-24T16:00:00.000000Z", "cursor": "7"}
        assert broker.records()[-1]["body"]["filters"] == given
        await broker.reads.query_records(broker.asker, QueryRecords())
        assert broker.records()[-1]["body"]["filters"] == {}

    with_broker(tmp_path, test)


def test_use_filter_finds_intent_and_outcome(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("")
        use = broker.records()[2]["use"]
        page = await broker.reads.query_records(broker.asker, QueryRecords(use=use))
        assert [msgspec.json.decode(leaf)["index"] for leaf in page.records] == [2, 3]

    with_broker(tmp_path, test)


def test_times_bound_the_page_from_and_until(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        times = [from_rfc3339(record["time"]) for record in broker.records()]
        reader = Reader(tmp_path)
        for since, until in [(times[2], times[6]), (0, times[0]), (times[7] + 1, times[7] + 2), (times[0], times[7] + 1)]:
            expected = sum(since <= time < until for time in times)
            assert len(reader.page(RecordFilter(since_us=since, until_us=until)).leaves) == expected
        reader.close()

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("wanted", "pointer"),
    [(QueryRecords(key_version=1), "/key_version"), (QueryRecords(workload="spiffe://*/a"), "/workload")],
)
def test_filter_that_cannot_be_used_is_refused_by_name(tmp_path: Path, wanted: QueryRecords, pointer: str) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("")
        with pytest.raises(InvalidError) as caught:
            await broker.reads.query_records(broker.asker, wanted)
        assert [each for each, _ in caught.value.pointers] == [pointer]

    with_broker(tmp_path, test)


def test_pattern_is_for_who_may_read_everything(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine(OWN)
        with pytest.raises(DeniedError):
            await broker.reads.query_records(broker.asker, QueryRecords(workload="spiffe://example.org/payments/*"))
        assert broker.kinds()[-1] == "denial"
        broker.rules.engine.verdict = Verdict.FAILED
        with pytest.raises(PolicyFailedError):
            await broker.reads.query_records(broker.asker, QueryRecords(workload="spiffe://example.org/payments/*"))

    with_broker(tmp_path, test)


@pytest.mark.parametrize("cursor", ["-1", "x", "1.5", "9" * 20, "\u0661"])
def test_cursor_that_is_not_ours_is_refused(tmp_path: Path, cursor: str) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine = TrailEngine("")
        with pytest.raises(InvalidError):
            await broker.reads.query_records(broker.asker, QueryRecords(cursor=cursor))

    with_broker(tmp_path, test)


def test_keys_are_listed_and_shown_only_where_allowed(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        assert [key.name for key in (await broker.reads.list_keys(broker.asker)).keys] == ["orders"]
        shown = await broker.reads.show_key(broker.asker, ShowKey("orders"))
        assert (shown.algorithms, shown.versions[0].family, shown.versions[0].version) == (("ES256",), "ec-p256", 1)
        with pytest.raises(NotFoundError):
            await broker.reads.show_key(broker.asker, ShowKey("nothing"))
        broker.rules.engine.verdict = Verdict.DENY
        assert (await broker.reads.list_keys(broker.asker)).keys == ()
        with pytest.raises(NotFoundError):
            await broker.reads.show_key(broker.asker, ShowKey("orders"))

    with_broker(tmp_path, test)


ROLES = ("auditor", "workload", "responder", "admin", "break-glass")


def test_whoami_says_what_the_rules_let_the_caller_be(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        seen = await broker.reads.whoami(broker.asker)
        assert (seen.spiffe_id, seen.roles, seen.networks) == (OWN, ROLES, ("loopback",))
        broker.rules.engine.verdict = Verdict.DENY
        assert (await broker.reads.whoami(broker.asker)).roles == ()

    with_broker(tmp_path, test)
