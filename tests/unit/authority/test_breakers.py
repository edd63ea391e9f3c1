"""Break-glass: what it waives, for how long, what is on record, and who may close it. Allow, deny and could-not-decide twins."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from keybroker.errors import (
    AuditUnavailableError,
    ClockUntrustedError,
    DeniedError,
    FrozenError,
    InvalidError,
    NotFoundError,
    PolicyFailedError,
    RefusalError,
)
from keybroker.model.call import BreakGlass, CloseGlass, Explain, Pending, Sign, Signed
from keybroker.model.decision import Decision, Limit, Obligation, QuorumStage, Verdict
from keybroker.model.freeze import Freeze
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, asker_of, fake_broker, svid_of
from tests.unit.authority.test_journal import FailingDatabase

BODY = SignBody(algorithm=Algorithm.ES256, message=b"release 7")
ALICE = asker_of(svid_of("spiffe://example.org/human/alice"))
BOB = asker_of(svid_of("spiffe://example.org/human/bob"))
OPEN = BreakGlass("g", 1_800, "incident 7")


def with_broker(tmp_path: Path, test: Callable[[FakeBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


def demand(broker: FakeBroker, not_after: str = "", *, observe_only: bool = False) -> None:
    """Uses of the key need a quorum and are limited, by the one grant `g`; acts need nothing."""
    engine = broker.rules.engine
    decide = engine.decide
    stage = QuorumStage(1, ("managers",), ("bob",))
    limit = Limit(1, 60, "key")
    demanded = Obligation("g", "", not_after, (), (limit,), (stage,), 0, 3_600, (), observe_only)

    async def with_demands(request: bytes) -> Decision:
        decision = await decide(request)
        is_use = b'"operation":"sign"' in request and decision.verdict is Verdict.ALLOW
        return Decision(
            decision.verdict, decision.reasons, decision.grants, (demanded,) if is_use else decision.obligations, decision.policy,
            decision.engine, decision.record,
        )  # fmt: skip

    engine.decide = with_demands  # type: ignore[method-assign]  # as a policy with such a grant answers


@pytest.mark.case(75)
def test_use_needs_neither_quorum_nor_unit_while_glass_is_broken_and_says_so(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker)
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Pending)
        opened = (await broker.breakers.open(ALICE, OPEN)).glass
        for _ in range(3):
            assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Signed)
        assert (await broker.service.explain(broker.asker, Explain("orders", BODY))).allow
        intents = [each for each in broker.records() if each["kind"] == "intent"]
        assert [each["body"]["break_glass"] for each in intents] == [[opened.id]] * 3
        (made,) = [each for each in broker.records() if each["kind"] == "admin"]
        assert made["body"]["change"] == "break-glass-open"
        assert made["request"]["reason"] == "incident 7"
        assert made["index"] < intents[0]["index"]
        await broker.security.flush()
        assert "glass-broken" in {each["body"].get("event") for each in broker.records()}

    with_broker(tmp_path, test)


def test_use_without_demands_says_nothing_of_broken_glass(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.breakers.open(ALICE, OPEN)
        await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert "break_glass" not in next(each for each in broker.records() if each["kind"] == "intent")["body"]

    with_broker(tmp_path, test)


@pytest.mark.case(75)
def test_broken_glass_ends_by_itself_and_still_waits_for_its_review(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker)
        await broker.breakers.open(ALICE, OPEN)
        broker.clock.time_us += 1_800 * 1_000_000
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Pending)
        (waiting,) = (await broker.breakers.list(BOB)).glasses
        assert not waiting.is_open

    with_broker(tmp_path, test)


def test_another_grant_and_another_ones_end_are_not_waived(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker)
        await broker.breakers.open(ALICE, BreakGlass("other", 60, "incident 7"))
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Pending)

    async def ended(broker: FakeBroker) -> None:
        demand(broker, not_after="2001-01-01T00:00:00Z")
        await broker.breakers.open(ALICE, OPEN)
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))

    with_broker(tmp_path / "a", test)
    with_broker(tmp_path / "b", ended)


def test_who_opened_it_ends_it_and_only_another_person_reviews_it(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker)
        opened = (await broker.breakers.open(ALICE, OPEN)).glass
        ended = (await broker.breakers.close(ALICE, CloseGlass(opened.id, "over"))).glass
        assert (ended.is_open, ended.is_reviewed) == (False, False)
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Pending)
        assert len((await broker.breakers.list(BOB)).glasses) == 1
        assert (await broker.breakers.close(BOB, CloseGlass(opened.id, "nothing was signed"))).glass.is_reviewed
        assert (await broker.breakers.list(BOB)).glasses == ()
        with pytest.raises(NotFoundError):
            await broker.breakers.close(BOB, CloseGlass(opened.id, "again"))
        changes = [each["body"]["change"] for each in broker.records() if each["kind"] == "admin"]
        assert changes == ["break-glass-open", "break-glass-end", "break-glass-review"]

    with_broker(tmp_path, test)


@pytest.mark.parametrize(("verdict", "error"), [(Verdict.DENY, DeniedError), (Verdict.FAILED, PolicyFailedError)])
def test_glass_is_not_broken_where_the_rules_do_not_allow_it(tmp_path: Path, verdict: Verdict, error: type[RefusalError]) -> None:
    async def test(broker: FakeBroker) -> None:
        opened = (await broker.breakers.open(ALICE, OPEN)).glass
        broker.rules.engine.verdict, broker.rules.engine.reasons = verdict, ("policy-error",)
        with pytest.raises(error):
            await broker.breakers.open(BOB, OPEN)
        with pytest.raises(error):
            await broker.breakers.close(BOB, CloseGlass(opened.id, "note"))
        assert (await broker.breakers.list(BOB)).glasses == ()
        assert broker.kinds() == ["admin", "denial", "denial"]

    with_broker(tmp_path, test)


def test_frozen_identity_breaks_no_glass_and_broken_glass_lifts_no_freeze(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker)
        await broker.breakers.open(BOB, OPEN)
        broker.freezes.add(Freeze("01A", "key", "orders", "incident 7", "", ""))
        broker.freezes.add(Freeze("01B", "workload", ALICE.caller.id.text, "incident 7", "", ""))
        with pytest.raises(FrozenError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))
        with pytest.raises(FrozenError):
            await broker.breakers.open(ALICE, OPEN)

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("ask", "pointer"),
    [
        (BreakGlass("g", 0, "r"), "/seconds"),
        (BreakGlass("g", 3_601, "r"), "/seconds"),
        (BreakGlass("g", 1, " "), "/reason"),
        (BreakGlass("", 1, "r"), "/grant"),
    ],
)
def test_request_that_cannot_be_one_is_refused(tmp_path: Path, ask: BreakGlass, pointer: str) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(InvalidError) as refused:
            await broker.breakers.open(ALICE, ask)
        assert refused.value.pointers[0][0] == pointer
        assert broker.kinds() == []

    with_broker(tmp_path, test)


def test_glass_that_cannot_be_recorded_is_not_broken(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broken = FailingDatabase(broker.store._db, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")
        broker.store._db = broken  # type: ignore[assignment]  # fails on purpose
        with pytest.raises(AuditUnavailableError):
            await broker.breakers.open(ALICE, OPEN)
        broker.store._db = broken._real
        assert broker.glass.all() == ()

    with_broker(tmp_path, test)


def test_what_is_open_and_what_waits_for_review_survive_a_restart(tmp_path: Path) -> None:
    async def before(broker: FakeBroker) -> None:
        await broker.breakers.open(ALICE, OPEN)

    async def after(broker: FakeBroker) -> None:
        demand(broker)
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Signed)
        assert len((await broker.breakers.list(BOB)).glasses) == 1

    with_broker(tmp_path, before)
    with_broker(tmp_path, after)


def test_quorum_that_is_only_observed_is_on_record_with_each_use(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        demand(broker, observe_only=True)
        assert isinstance(await broker.service.sign(broker.asker, Sign("orders", BODY)), Signed)
        await broker.service.sign(broker.asker, Sign("orders", BODY))
        intents = [each["body"]["observed"] for each in broker.records() if each["kind"] == "intent"]
        assert intents == [["quorum:g"], ["quorum:g", "limit:g"]]
        assert 'keybroker_observed_total{demand="quorum"} 2.0' in broker.metrics.text({}, 0, is_writable=True).decode()
        await broker.breakers.open(ALICE, OPEN)
        await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert [each for each in broker.records() if each["kind"] == "intent"][-1]["body"]["observed"] == []

    with_broker(tmp_path, test)


def test_act_whose_grant_has_ended_is_denied_and_one_that_nobody_can_date_fails(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        engine, decide = broker.rules.engine, broker.rules.engine.decide

        async def ended(request: bytes) -> Decision:
            decision = await decide(request)
            return replace(decision, obligations=(Obligation("g", "", "2001-01-01T00:00:00Z", (), (), (), 0, 0, (), observe_only=False),))

        engine.decide = ended  # type: ignore[method-assign]  # as a policy with such a grant answers
        with pytest.raises(DeniedError) as refused:
            await broker.breakers.open(ALICE, OPEN)
        assert refused.value.reasons == ("not-after:g",)
        broker.clock.jump(24 * 3_600 * 1_000_000)
        with pytest.raises(ClockUntrustedError):
            await broker.breakers.open(ALICE, OPEN)
        engine.decide = decide  # type: ignore[method-assign]  # as above
        with pytest.raises(ClockUntrustedError):
            await broker.breakers.open(ALICE, OPEN)

    with_broker(tmp_path, test)
