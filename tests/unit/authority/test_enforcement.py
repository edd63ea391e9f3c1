"""Limits, hours and the clock in the one order: what is refused, what is on record then, and what is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.authority import hours
from keybroker.authority.tokens import SigningFailedError
from keybroker.clock import from_rfc3339
from keybroker.errors import ClockUntrustedError, DeniedError, HsmUnavailableError, PolicyFailedError, RateLimitedError
from keybroker.model.call import Explain, Problem, QueryRecords, Sign, SignBatch, Signed
from keybroker.model.decision import HoursWindow, Limit, Obligation, Verdict, no_obligation
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, fake_broker
from tests.clocks import FixedClock

SECOND, HOUR, DAY = 1_000_000, 3_600_000_000, 86_400_000_000
WEDNESDAY = from_rfc3339("2026-11-25T00:00:00Z")
OFFICE = HoursWindow(("mon", "tue", "wed", "thu", "fri"), "08:00", "17:00", "UTC", ())
MINUTE = Limit(3, 60, "workload")


def ask(number: int = 0, idempotency_key: str = "") -> Sign:
    return Sign("orders", SignBody(algorithm=Algorithm.ES256, message=b"message %d" % number), idempotency_key)


def demand(
    *, limits: tuple[Limit, ...] = (), windows: tuple[HoursWindow, ...] = (), not_after: str = "", not_before: str = "",
    observe_only: bool = False, grant: str = "g",
) -> Obligation:  # fmt: skip
    return Obligation(grant, not_before, not_after, windows, limits, (), 0, 0, (), observe_only)


def with_demands(
    tmp_path: Path,
    test: Callable[[FakeBroker], Awaitable[None]],
    *obligations: Obligation,
    at: str = "2026-11-25T12:00:00Z",
) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path, FixedClock(from_rfc3339(at))) as broker:
            broker.rules.engine.obligations = obligations
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


async def signs(broker: FakeBroker, number: int = 0) -> bool:
    """Whether one use is allowed; False for a limit."""
    try:
        await broker.service.sign(broker.asker, ask(number))
    except RateLimitedError:
        return False
    return True


def of_kind(broker: FakeBroker, kind: str) -> list[dict[str, Any]]:
    return [record for record in broker.records() if record["kind"] == kind]


# Limits.


def test_use_beyond_a_limit_is_refused_with_the_time_to_wait_and_on_record(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        for number in range(3):
            await broker.service.sign(broker.asker, ask(number))
            broker.clock.time_us += 10 * SECOND
        with pytest.raises(RateLimitedError) as caught:
            await broker.service.sign(broker.asker, ask(3))
        assert (caught.value.retry_after, caught.value.reasons) == (31, ("limit:g",))
        assert broker.tokens.signed == 3
        denial = of_kind(broker, "denial")[0]
        assert (denial["body"]["code"], denial["body"]["unmet"], denial["decision"]["allow"]) == ("rate-limited", ["limit:g"], True)
        broker.clock.time_us += 30 * SECOND
        assert not await signs(broker)
        broker.clock.time_us += 1 * SECOND
        assert await signs(broker)
        assert not await signs(broker)

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


def test_intent_says_what_was_taken_and_nothing_else_does(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask())
        unit = {"grant": "g", "per": "workload", "units": 1, "window_s": 60}
        assert [record["taken"] for record in broker.records()] == [[unit, unit | {"per": "key", "window_s": 3600}], []]
        assert of_kind(broker, "intent")[0]["body"]["observed"] == []

    with_demands(tmp_path, test, demand(limits=(MINUTE, Limit(100, 3600, "key"))))


def test_limits_of_all_grants_bind_and_a_refused_use_takes_none_of_any(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        assert [await signs(broker) for _ in range(3)] == [True, True, False]
        broker.rules.engine.obligations = broker.rules.engine.obligations[:1]
        assert [await signs(broker) for _ in range(2)] == [True, False]

    with_demands(tmp_path, test, demand(limits=(MINUTE,)), demand(limits=(Limit(2, 60, "key"),), grant="h"))


def test_concurrent_uses_in_shared_commits_see_each_other(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.obligations = (demand(limits=(Limit(10, 60, "key"),)),)
        results = await asyncio.gather(*(signs(broker, number) for number in range(60)))
        assert sum(results) == 10
        assert len(of_kind(broker, "intent")) == 10

    with_demands(tmp_path, test)


@pytest.mark.case(38)
def test_unit_stays_spent_when_the_token_fails(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.tokens.fault = SigningFailedError("CKR_GENERAL_ERROR", may_have_signed=False)
        for _ in range(3):
            with pytest.raises(HsmUnavailableError):
                await broker.service.sign(broker.asker, ask())
        broker.tokens.fault = None
        with pytest.raises(RateLimitedError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert caught.value.retry_after == 61
        assert broker.tokens.signed == 0

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


@pytest.mark.case(37)
def test_units_are_still_spent_after_a_restart(tmp_path: Path) -> None:
    clock = FixedClock()

    async def main() -> None:
        allowed = 0
        for _ in range(5):
            async with fake_broker(tmp_path, clock) as broker:
                broker.rules.engine.obligations = (demand(limits=(MINUTE,)),)
                allowed += await signs(broker)
                clock.time_us += SECOND
        assert allowed == 3

    asyncio.run(main())


@pytest.mark.case(20)
def test_answer_given_again_takes_no_unit(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        first = await broker.service.sign(broker.asker, ask(0, "key-1"))
        for _ in range(5):
            assert await broker.service.sign(broker.asker, ask(0, "key-1")) == first
        assert [await signs(broker, number) for number in range(3)] == [True, True, False]

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


def test_each_item_of_a_batch_takes_a_unit(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        items = tuple(SignBody(algorithm=Algorithm.ES256, message=bytes([number])) for number in range(10))
        answers = await broker.service.sign_batch(broker.asker, SignBatch("orders", items))
        assert sum(isinstance(answer, Signed) for answer in answers) == 3
        assert {answer.code for answer in answers if isinstance(answer, Problem)} == {"rate-limited"}
        assert all(answer.retry_after == 61 for answer in answers if isinstance(answer, Problem))

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


def test_denied_use_takes_no_unit(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.verdict = Verdict.DENY
        for _ in range(5):
            with pytest.raises(DeniedError):
                await broker.service.sign(broker.asker, ask())
        broker.rules.engine.verdict = Verdict.ALLOW
        assert [await signs(broker) for _ in range(4)] == [True, True, True, False]

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


def test_explain_says_what_is_left_and_takes_nothing(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask())
        question = Explain("orders", ask().body)
        replies = [await broker.service.explain(broker.asker, question) for _ in range(4)]
        reply = replies[-1]
        assert reply.allow
        assert [(each.max, each.window_s, each.per, each.left, each.retry_after) for each in reply.limits] == [(3, 60, "workload", 2, 0)]
        assert [await signs(broker) for _ in range(3)] == [True, True, False]
        reply = await broker.service.explain(broker.asker, question)
        assert (reply.allow, reply.reasons, reply.needs) == (False, ("limit:g",), ("to wait 61 s for a limit of g",))
        assert (reply.limits[0].left, reply.limits[0].retry_after) == (0, 61)

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


# Hours.


@pytest.mark.parametrize(
    ("at", "obligation", "reasons"),
    [
        ("2026-11-25T07:59:59Z", demand(windows=(OFFICE,)), ("hours:g",)),
        ("2026-11-25T17:00:00Z", demand(windows=(OFFICE,)), ("hours:g",)),
        ("2026-11-28T12:00:00Z", demand(windows=(OFFICE,)), ("hours:g",)),
        ("2026-11-25T12:00:00Z", demand(not_before="2026-11-25T12:00:01Z"), ("not-before:g",)),
        ("2026-11-25T12:00:00Z", demand(not_after="2026-11-25T12:00:00Z"), ("not-after:g",)),
        ("2026-11-28T12:00:00Z", demand(windows=(OFFICE,), not_after="2026-11-25T12:00:00Z"), ("not-after:g", "hours:g")),
    ],
)
def test_use_outside_hours_is_denied_with_the_reason_and_takes_no_unit(
    tmp_path: Path, at: str, obligation: Obligation, reasons: tuple[str, ...]
) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(DeniedError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert caught.value.reasons == reasons
        assert (broker.kinds(), broker.tokens.signed) == (["denial"], 0)
        assert broker.records()[0]["body"]["unmet"] == list(reasons)
        reply = await broker.service.explain(broker.asker, Explain("orders", ask().body))
        assert (reply.allow, reply.reasons, len(reply.needs)) == (False, reasons, len(reasons))
        broker.rules.engine.obligations = (demand(limits=(MINUTE,)),)
        assert [await signs(broker) for _ in range(4)] == [True, True, True, False]

    with_demands(tmp_path, test, demand(limits=(MINUTE,)), obligation, at=at)


@pytest.mark.parametrize("at", ["2026-11-25T08:00:00Z", "2026-11-25T16:59:59Z"])
def test_use_within_hours_is_signed(tmp_path: Path, at: str) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["intent", "signed"]

    window = demand(windows=(OFFICE,), not_before="2026-11-25T08:00:00Z", not_after="2026-11-25T17:00:00Z")
    with_demands(tmp_path, test, window, at=at)


@pytest.mark.case(40)
def test_use_is_withheld_when_its_window_closes_while_the_token_works(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def slow() -> None:
            broker.clock.time_us += SECOND

        broker.tokens.on_sign = slow
        with pytest.raises(DeniedError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert caught.value.reasons == ("hours:g",)
        assert broker.kinds() == ["intent", "withheld"]

    with_demands(tmp_path, test, demand(windows=(OFFICE,)), at="2026-11-25T16:59:59.900000Z")


@pytest.mark.case(40)
def test_token_is_not_asked_when_the_window_closes_before(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        write = broker.journal.write

        async def slowly(entry: Any) -> int:
            index = await write(entry)
            broker.clock.time_us = max(broker.clock.time_us, WEDNESDAY + 17 * HOUR)
            return index

        broker.service._journal.write = slowly  # type: ignore[method-assign]
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, ask())
        assert (broker.kinds(), broker.tokens.signed) == (["intent", "withheld"], 0)

    with_demands(tmp_path, test, demand(windows=(OFFICE,)), at="2026-11-25T16:59:59.900000Z")


def test_zone_that_this_host_does_not_know_is_no_decision(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        hours._is_any_open.cache_clear()
        with pytest.raises(PolicyFailedError):
            await broker.service.sign(broker.asker, ask())
        assert (broker.kinds(), broker.tokens.signed) == (["denial"], 0)

    with_demands(tmp_path, test, demand(windows=(HoursWindow(("wed",), "00:00", "24:00", "Europe/Atlantis", ()),)))


def test_reading_is_bound_by_moments(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.reads.query_records(broker.asker, QueryRecords())
        broker.clock.time_us += SECOND
        with pytest.raises(DeniedError) as caught:
            await broker.reads.query_records(broker.asker, QueryRecords())
        assert caught.value.reasons == ("not-after:g",)
        assert broker.records()[-1]["body"]["unmet"] == ["not-after:g"]
        assert (await broker.reads.list_keys(broker.asker)).keys == ()

    with_demands(tmp_path, test, demand(not_after="2026-11-25T12:00:01Z"))


def test_reading_under_a_grant_that_only_observes_goes_on_and_says_so(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.reads.query_records(broker.asker, QueryRecords())
        broker.clock.time_us += SECOND
        await broker.reads.query_records(broker.asker, QueryRecords())
        assert [record["body"]["observed"] for record in broker.records()] == [[], ["not-after:g"]]

    with_demands(tmp_path, test, demand(not_after="2026-11-25T12:00:01Z", observe_only=True))


# The clock.


@pytest.mark.case(39)
@pytest.mark.parametrize("jump_us", [-HOUR, DAY, -6 * SECOND, 6 * SECOND])
def test_rules_about_time_fail_closed_when_the_clock_is_set_and_other_uses_go_on(tmp_path: Path, jump_us: int) -> None:
    async def test(broker: FakeBroker) -> None:
        assert [await signs(broker) for _ in range(4)] == [True, True, True, False]
        broker.clock.jump(jump_us)
        with pytest.raises(ClockUntrustedError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert caught.value.retry_after == 60
        assert broker.records()[-1]["body"]["unmet"] == ["clock-untrusted"]
        broker.rules.engine.obligations = (demand(not_after="2030-01-01T00:00:00Z"),)
        with pytest.raises(ClockUntrustedError):
            await broker.service.sign(broker.asker, ask())
        with pytest.raises(ClockUntrustedError):
            await broker.reads.query_records(broker.asker, QueryRecords())
        broker.rules.engine.obligations = (no_obligation("g"),)
        await broker.service.sign(broker.asker, ask())

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


@pytest.mark.case(39)
@pytest.mark.parametrize("jump_us", [-HOUR, DAY])
def test_no_setting_of_the_clock_refills_a_limit(tmp_path: Path, jump_us: int) -> None:
    async def test(broker: FakeBroker) -> None:
        assert [await signs(broker) for _ in range(4)] == [True, True, True, False]
        for _ in range(2):
            broker.clock.jump(jump_us)
            broker.timekeeper.look()
            broker.timekeeper.acknowledge()
            assert not await signs(broker)
        broker.clock.time_us += 59 * SECOND
        assert not await signs(broker)
        broker.clock.time_us += 2 * SECOND
        assert await signs(broker)

    with_demands(tmp_path, test, demand(limits=(MINUTE,)))


@pytest.mark.case(39)
def test_small_steps_of_the_clock_pass_and_do_not_open_a_window_again(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask())
        broker.clock.time_us += 2 * SECOND
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, ask())
        broker.clock.jump(-3 * SECOND)  # it is 16:59:58 again, and the record has been later
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, ask())
        assert broker.tokens.signed == 1

    with_demands(tmp_path, test, demand(windows=(OFFICE,)), at="2026-11-25T16:59:59Z")


def test_use_under_way_is_withheld_when_the_clock_is_set_meanwhile(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def set_the_clock() -> None:
            broker.clock.jump(HOUR)

        broker.tokens.on_sign = set_the_clock
        with pytest.raises(ClockUntrustedError):
            await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["intent", "withheld"]

    with_demands(tmp_path, test, demand(not_after="2030-01-01T00:00:00Z"))


# Grants that only observe.


def test_grant_that_only_observes_allows_and_records_what_it_would_have_refused(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        for _ in range(5):
            await broker.service.sign(broker.asker, ask())
        bodies = [(record["body"]["observed"], len(record["taken"])) for record in of_kind(broker, "intent")]
        assert bodies == [([], 1)] * 3 + [(["limit:g"], 0)] * 2
        broker.clock.time_us += 6 * HOUR
        await broker.service.sign(broker.asker, ask())
        intent = of_kind(broker, "intent")[-1]
        assert (intent["body"]["observed"], intent["taken"]) == (["hours:g"], [])
        broker.clock.jump(DAY)
        await broker.service.sign(broker.asker, ask())
        assert of_kind(broker, "intent")[-1]["body"]["observed"] == ["clock-untrusted"]
        reply = await broker.service.explain(broker.asker, Explain("orders", ask().body))
        assert (reply.allow, reply.reasons) == (True, ())
        text = broker.metrics.text({}, 0, is_writable=True).decode()
        assert 'keybroker_observed_total{demand="limit"} 2.0' in text
        assert 'keybroker_observed_total{demand="hours"} 1.0' in text

    with_demands(tmp_path, test, demand(limits=(MINUTE,), windows=(OFFICE,), observe_only=True))


def test_grant_that_binds_refuses_beside_one_that_only_observes(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        assert [await signs(broker) for _ in range(4)] == [True, True, True, False]
        assert [record["body"]["observed"] for record in of_kind(broker, "intent")] == [[], ["limit:o"], ["limit:o"]]

    with_demands(tmp_path, test, demand(limits=(Limit(1, 60, "key"),), observe_only=True, grant="o"), demand(limits=(MINUTE,)))
