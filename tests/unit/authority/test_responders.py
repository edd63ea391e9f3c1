"""Freezes: who may, what they stop, from when on, and what is on record. Allow, deny and could-not-decide twins."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.errors import (
    AuditUnavailableError,
    DeniedError,
    FrozenError,
    InvalidError,
    NotFoundError,
    OverloadedError,
    PolicyFailedError,
    RefusalError,
)
from keybroker.model.call import AskFreeze, AskUnfreeze, Explain, FreezeReply, Sign
from keybroker.model.decision import NO_GRANT, Verdict
from keybroker.model.freeze import Freeze
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, asker_of, fake_broker, svid_of
from tests.unit.authority.test_journal import FailingDatabase

BODY = SignBody(algorithm=Algorithm.ES256, message=b"pay 100 to alice")
API = "spiffe://example.org/payments/api"
RESPONDER = asker_of(svid_of("spiffe://example.org/human/rita"))
TARGETS = (("workload", API), ("key", "orders"), ("token", "fake"), ("everything", ""))


def freeze(kind: Any = "key", target: str = "orders", reason: str = "incident 7") -> AskFreeze:
    return AskFreeze(kind, target, reason)


def with_broker(tmp_path: Path, test: Callable[[FakeBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_freeze_stops_the_next_use_and_unfreezing_lets_it_go_on(tmp_path: Path, kind: str, target: str) -> None:
    async def test(broker: FakeBroker) -> None:
        frozen = (await broker.responders.freeze(RESPONDER, freeze(kind, target))).freeze
        with pytest.raises(FrozenError) as refused:
            await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert refused.value.reasons == (f"frozen-{kind}",)
        assert broker.tokens.signed == 0
        await broker.responders.unfreeze(RESPONDER, AskUnfreeze(frozen.id))
        await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert broker.kinds() == ["freeze", "denial", "freeze", "intent", "signed"]
        made, denial, lifted = broker.records()[:3]
        assert made["body"] | {"request_id": ""} == {"change": "freeze", "freeze": frozen.id, "request_id": ""}
        assert made["request"]["operation"] == "freeze"
        assert made["request"]["reason"] == "incident 7"
        assert made["request"]["target"]["kind"] == kind
        assert made["request"]["target"]["workload" if kind == "workload" else "id"] == target
        assert made["trail"]["id"] == RESPONDER.caller.id.text
        assert denial["body"]["code"] == "frozen"
        assert lifted["body"]["change"] == "unfreeze"

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("kind", "target"),
    [("workload", "spiffe://example.org/payments/other"), ("workload", f"{API}/v2"), ("token", "other"), ("key", "release")],
)
def test_freeze_of_something_else_stops_nothing(tmp_path: Path, kind: str, target: str) -> None:
    async def test(broker: FakeBroker) -> None:
        with_others = {"key": NotFoundError, "token": NotFoundError}.get(kind)
        if with_others:  # there is no other key or token in this broker
            with pytest.raises(with_others):
                await broker.responders.freeze(RESPONDER, freeze(kind, target))
        else:
            await broker.responders.freeze(RESPONDER, freeze(kind, target))
        await broker.service.sign(broker.asker, Sign("orders", BODY))

    with_broker(tmp_path, test)


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_use_under_way_is_withheld_when_it_is_frozen_at_the_token(tmp_path: Path, kind: str, target: str) -> None:
    async def test(broker: FakeBroker) -> None:
        async def on_sign() -> None:
            await broker.responders.freeze(RESPONDER, freeze(kind, target))

        broker.tokens.on_sign = on_sign
        with pytest.raises(FrozenError) as refused:
            await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert broker.kinds() == ["intent", "freeze", "withheld"]
        assert broker.records()[2]["body"]["cause"] == "frozen"
        assert refused.value.use == broker.records()[0]["use"]

    with_broker(tmp_path, test)


def test_use_that_waits_to_be_recorded_is_decided_again_and_refused_when_it_is_frozen(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        is_first = True

        def on_decide() -> None:
            nonlocal is_first
            if is_first and b'"sign"' in broker.rules.engine.asked[-1]:
                is_first = False
                broker.freezes.add(Freeze("01FREEZE", "everything", "", "incident 7", API, ""))
                broker.generation.advance()

        broker.rules.engine.on_decide = on_decide
        with pytest.raises(FrozenError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))
        assert broker.kinds() == ["denial"]

    with_broker(tmp_path, test)


def test_caller_without_a_grant_gets_not_found_whether_the_key_is_frozen_or_not(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.responders.freeze(RESPONDER, freeze())
        broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, (NO_GRANT,)
        for ask in (Sign("orders", BODY), Sign("nothing", BODY)):
            with pytest.raises(NotFoundError):
                await broker.service.sign(broker.asker, ask)
        with pytest.raises(NotFoundError):
            await broker.service.explain(broker.asker, Explain("orders", BODY))

    with_broker(tmp_path, test)


def test_explain_says_that_a_key_is_frozen(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.responders.freeze(RESPONDER, freeze())
        explained = await broker.service.explain(broker.asker, Explain("orders", BODY))
        assert (explained.allow, explained.reasons, explained.needs) == (False, ("frozen-key",), ("the end of the freeze",))

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("verdict", "reasons", "error"),
    [
        (Verdict.DENY, ("denied-by:d",), DeniedError),
        (Verdict.DENY, (NO_GRANT,), NotFoundError),
        (Verdict.FAILED, ("policy-error",), PolicyFailedError),
    ],
)
def test_freeze_and_unfreeze_are_refused_and_on_record_when_rules_do_not_allow(
    tmp_path: Path, verdict: Verdict, reasons: tuple[str, ...], error: type[RefusalError]
) -> None:
    async def test(broker: FakeBroker) -> None:
        frozen = (await broker.responders.freeze(RESPONDER, freeze())).freeze
        broker.rules.engine.verdict, broker.rules.engine.reasons = verdict, reasons
        with pytest.raises(error):
            await broker.responders.freeze(broker.asker, freeze())
        with pytest.raises(error):
            await broker.responders.unfreeze(broker.asker, AskUnfreeze(frozen.id))
        assert broker.kinds() == ["freeze", "denial", "denial"]
        assert broker.freezes.find(frozen.id) is not None
        assert (await broker.responders.list(RESPONDER)).freezes == ()

    with_broker(tmp_path, test)


def test_frozen_identity_can_neither_freeze_nor_lift_its_own_freeze(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        frozen = (await broker.responders.freeze(RESPONDER, freeze("workload", API))).freeze
        with pytest.raises(FrozenError):
            await broker.responders.unfreeze(broker.asker, AskUnfreeze(frozen.id))
        with pytest.raises(FrozenError):
            await broker.responders.freeze(broker.asker, freeze())
        assert broker.kinds() == ["freeze", "denial", "denial"]

    with_broker(tmp_path, test)


def test_everything_frozen_can_be_lifted(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        frozen = (await broker.responders.freeze(RESPONDER, freeze("everything", ""))).freeze
        assert await broker.responders.unfreeze(broker.asker, AskUnfreeze(frozen.id)) == FreezeReply(frozen)
        assert broker.freezes.all() == ()

    with_broker(tmp_path, test)


def test_two_freezes_of_one_target_are_lifted_one_by_one_and_repeating_one_makes_no_second(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        mine = (await broker.responders.freeze(RESPONDER, freeze())).freeze
        assert (await broker.responders.freeze(RESPONDER, freeze(reason="again"))).freeze == mine
        other = (await broker.responders.freeze(asker_of(svid_of("spiffe://example.org/human/otto")), freeze())).freeze
        assert [each.id for each in (await broker.responders.list(RESPONDER)).freezes] == [mine.id, other.id]
        await broker.responders.unfreeze(RESPONDER, AskUnfreeze(mine.id))
        with pytest.raises(FrozenError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))
        with pytest.raises(NotFoundError):
            await broker.responders.unfreeze(RESPONDER, AskUnfreeze(mine.id))

    with_broker(tmp_path, test)


def test_freezes_of_one_identity_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("keybroker.authority.responders.MAX_FREEZES", 2)

    async def test(broker: FakeBroker) -> None:
        for number in range(2):
            await broker.responders.freeze(RESPONDER, freeze("workload", f"spiffe://example.org/w/{number}"))
        with pytest.raises(OverloadedError):
            await broker.responders.freeze(RESPONDER, freeze("workload", "spiffe://example.org/w/2"))
        await broker.responders.freeze(broker.asker, freeze("workload", "spiffe://example.org/w/2"))

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("ask", "pointer"),
    [
        (freeze("everything", "x"), "/everything"),
        (freeze("key", ""), "/key"),
        (freeze("workload", "spiffe://example.org/../x"), "/workload"),
        (freeze("workload", "spiffe://example.org/*"), "/workload"),
        (freeze(reason=" "), "/reason"),
        (freeze(reason="x" * 1_025), "/reason"),
        (freeze("rule", "x"), ""),
    ],
)
def test_freeze_that_cannot_be_one_is_refused(tmp_path: Path, ask: AskFreeze, pointer: str) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(InvalidError) as refused:
            await broker.responders.freeze(RESPONDER, ask)
        assert refused.value.pointers[0][0] == pointer
        assert broker.kinds() == []

    with_broker(tmp_path, test)


def test_freeze_that_cannot_be_recorded_is_not_in_force(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broken = FailingDatabase(broker.store._db, "COMMIT", sqlite3.SQLITE_FULL, "SQLITE_FULL")
        broker.store._db = broken  # type: ignore[assignment]  # fails on purpose
        with pytest.raises(AuditUnavailableError):
            await broker.responders.freeze(RESPONDER, freeze())
        broker.store._db = broken._real
        assert broker.freezes.all() == ()
        await broker.service.sign(broker.asker, Sign("orders", BODY))

    with_broker(tmp_path, test)


def test_same_freeze_at_the_same_time_waits_until_it_is_known_how_the_first_ends(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        both = await asyncio.gather(*(broker.responders.freeze(RESPONDER, freeze()) for _ in range(2)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in both) == ["FreezeReply", "InProgressError"]
        assert len(broker.freezes.all()) == 1
        assert broker.kinds() == ["freeze"]

    with_broker(tmp_path, test)


def test_freezes_survive_a_restart_and_lifted_ones_do_not_come_back(tmp_path: Path) -> None:
    kept: list[str] = []

    async def before(broker: FakeBroker) -> None:
        kept.append((await broker.responders.freeze(RESPONDER, freeze())).freeze.id)
        lifted = (await broker.responders.freeze(RESPONDER, freeze("everything", ""))).freeze
        await broker.responders.unfreeze(RESPONDER, AskUnfreeze(lifted.id))

    async def after(broker: FakeBroker) -> None:
        assert [each.id for each in broker.freezes.all()] == kept
        with pytest.raises(FrozenError):
            await broker.service.sign(broker.asker, Sign("orders", BODY))

    with_broker(tmp_path, before)
    with_broker(tmp_path, after)
