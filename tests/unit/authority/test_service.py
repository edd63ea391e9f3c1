"""The one order: each step that breaks, and what must be on record and released then. Allow, deny and could-not-decide twins."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from keybroker.authority import service
from keybroker.authority.selfcheck import Check, verifies
from keybroker.authority.tokens import SigningFailedError
from keybroker.errors import (
    AuditUnavailableError,
    DeniedError,
    HsmTimeoutError,
    HsmUnavailableError,
    IdempotencyMismatchError,
    InvalidError,
    NotFoundError,
    OverloadedError,
    PolicyFailedError,
    PolicyUnavailableError,
    RefusalError,
    SelfCheckError,
    SvidInvalidError,
)
from keybroker.model.call import Explain, Pending, Problem, Sign, SignBatch, Signed
from keybroker.model.decision import NO_GRANT, Verdict
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.brokers import FakeBroker, fake_broker
from tests.unit.authority.test_journal import FailingDatabase

MESSAGE = b"pay 100 to alice"
BODY = SignBody(algorithm=Algorithm.ES256, message=MESSAGE, reason="invoice 7")


def ask(**changes: Any) -> Sign:
    return Sign("orders", **({"body": BODY} | changes))


def released(reply: Signed | Pending) -> Signed:
    assert isinstance(reply, Signed)
    return reply


def with_broker(tmp_path: Path, test: Callable[[FakeBroker], Awaitable[None]]) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            await test(broker)
            assert broker.faults() == []

    asyncio.run(main())


def test_sign_releases_a_good_signature_with_intent_and_outcome_on_record(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        signed = released(await broker.service.sign(broker.asker, ask()))
        digest = hashlib.sha256(MESSAGE).digest()
        assert verifies(Check(broker.tokens.spki, Algorithm.ES256, digest, signed.signature))
        intent, outcome = broker.records()
        assert (intent["kind"], outcome["kind"], outcome["outcome"]) == ("intent", "outcome", "signed")
        assert (signed.intent, signed.outcome) == (0, 1)
        assert intent["use"] == outcome["use"] == signed.use
        assert intent["tbs"] == {"hash": "sha256", "value": digest.hex()}
        assert intent["request"]["reason"] == "invoice 7"
        assert intent["request"]["caller"]["networks"] == ["loopback"]
        assert intent["decision"]["allow"] is True
        assert outcome["signature_sha256"] == hashlib.sha256(signed.signature).hexdigest()
        assert outcome["token"] == {"serial": "01", "label": "fake"}
        assert base64.b64encode(MESSAGE).decode() not in json.dumps(broker.records())

    with_broker(tmp_path, test)


def test_sign_releases_p1363_when_asked(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        signed = released(
            await broker.service.sign(broker.asker, ask(body=SignBody(algorithm=Algorithm.ES256, message=MESSAGE, format="p1363")))
        )
        assert len(signed.signature) == 64
        assert broker.records()[1]["signature_sha256"] == hashlib.sha256(signed.signature).hexdigest()

    with_broker(tmp_path, test)


@pytest.mark.parametrize(
    ("verdict", "reasons", "error"),
    [
        (Verdict.DENY, ("algorithm-not-granted",), DeniedError),
        (Verdict.DENY, (NO_GRANT,), NotFoundError),
        pytest.param(Verdict.FAILED, ("policy-error",), PolicyFailedError, marks=pytest.mark.case(21)),
        pytest.param(Verdict.FAILED, ("policy-unavailable",), PolicyUnavailableError, marks=pytest.mark.case(22)),
    ],
)
def test_sign_is_refused_and_on_record_when_rules_do_not_allow(
    tmp_path: Path, verdict: Verdict, reasons: tuple[str, ...], error: type[RefusalError]
) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.verdict, broker.rules.engine.reasons = verdict, reasons
        with pytest.raises(error):
            await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["denial"]
        assert broker.records()[0]["body"]["code"] == error.code
        assert broker.tokens.signed == 0

    with_broker(tmp_path, test)


def _fault(ckr: str, *, may_have_signed: bool) -> Callable[[FakeBroker], None]:
    def setup(broker: FakeBroker) -> None:
        broker.tokens.fault = SigningFailedError(ckr, may_have_signed=may_have_signed)

    return setup


def _unavailable_after_the_intent(broker: FakeBroker) -> None:
    broker.tokens.fault = HsmUnavailableError("gone")


def _lie(broker: FakeBroker) -> None:
    broker.tokens.lies = True


def _bug(broker: FakeBroker) -> None:
    broker.tokens.fault = ZeroDivisionError()


@pytest.mark.parametrize(
    ("setup", "error", "outcome"),
    [
        pytest.param(
            _fault("CKR_SESSION_HANDLE_INVALID", may_have_signed=False), HsmUnavailableError, "failed", marks=pytest.mark.case(43)
        ),
        pytest.param(_fault("timeout", may_have_signed=True), HsmTimeoutError, "unknown", marks=pytest.mark.case(46)),
        pytest.param(_fault("worker-lost", may_have_signed=True), HsmUnavailableError, "unknown", marks=pytest.mark.case(47)),
        pytest.param(_fault("CKR_GENERAL_ERROR", may_have_signed=True), HsmUnavailableError, "unknown", marks=pytest.mark.case(48)),
        pytest.param(_lie, SelfCheckError, "failed", marks=pytest.mark.case(49)),
        (_unavailable_after_the_intent, HsmUnavailableError, "failed"),
        (_bug, OverloadedError, "unknown"),
    ],
)
def test_sign_releases_nothing_and_records_the_outcome_when_the_token_fails(
    tmp_path: Path, setup: Callable[[FakeBroker], None], error: type[RefusalError], outcome: str
) -> None:
    async def test(broker: FakeBroker) -> None:
        setup(broker)
        with pytest.raises(error):
            await broker.service.sign(broker.asker, ask())
        broker.tokens.fault, broker.tokens.lies = None, False
        await broker.service.sign(broker.asker, ask())  # the next one succeeds, and carries what was owed
        assert sorted(broker.kinds()) == sorted(["intent", outcome, "intent", "signed"])
        assert broker.service.under_way == 0

    with_broker(tmp_path, test)


@pytest.mark.case(49)
def test_worker_is_distrusted_and_event_recorded_when_its_signature_is_wrong(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.tokens.lies = True
        with pytest.raises(SelfCheckError):
            await broker.service.sign(broker.asker, ask())
        assert broker.tokens.distrusted == ["fake-0"]
        await broker.security.flush()
        assert broker.records()[-1]["body"]["event"] == "self-check-failed"

    with_broker(tmp_path, test)


# What the store says, and what the caller is told.
UNWRITABLE = [
    pytest.param(sqlite3.SQLITE_FULL, "SQLITE_FULL", "audit-unavailable", marks=pytest.mark.case(57)),
    pytest.param(sqlite3.SQLITE_BUSY, "SQLITE_BUSY", "overloaded", marks=pytest.mark.case(62)),
]


@pytest.mark.parametrize(("number", "name", "code"), UNWRITABLE)
def test_no_key_is_used_when_the_intent_is_not_durable(tmp_path: Path, number: int, name: str, code: str) -> None:
    async def test(broker: FakeBroker) -> None:
        real = broker.store._db
        broker.store._db = FailingDatabase(real, "COMMIT", number, name)  # type: ignore[assignment]
        with pytest.raises(AuditUnavailableError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert (caught.value.code, caught.value.retry_after) == (code, 1)
        assert broker.tokens.signed == 0
        broker.store._db = real
        assert broker.records() == []

    with_broker(tmp_path, test)


@pytest.mark.parametrize(("number", "name", "code"), UNWRITABLE)
def test_nothing_is_released_when_the_outcome_is_not_durable(tmp_path: Path, number: int, name: str, code: str) -> None:
    async def test(broker: FakeBroker) -> None:
        real = broker.store._db

        async def break_the_store() -> None:
            broker.store._db = FailingDatabase(real, "COMMIT", number, name)  # type: ignore[assignment]

        broker.tokens.on_sign = break_the_store
        with pytest.raises(AuditUnavailableError) as caught:
            await broker.service.sign(broker.asker, ask())
        assert caught.value.code == code
        assert len(caught.value.use) == 26
        assert broker.tokens.signed == 1
        broker.store._db, broker.tokens.on_sign = real, None
        await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["intent", "unknown", "security", "intent", "signed"]

    with_broker(tmp_path, test)


def test_decision_is_made_again_when_rules_change_before_the_intent(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.on_decide = lambda: broker.generation.advance() if len(broker.rules.engine.asked) == 1 else None
        await broker.service.sign(broker.asker, ask())
        assert len(broker.rules.engine.asked) == 2
        assert broker.kinds() == ["intent", "signed"]

    with_broker(tmp_path, test)


@pytest.mark.case(26)
def test_decision_is_made_again_with_the_networks_of_the_new_rules(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        def once() -> None:
            broker.rules.engine.on_decide = lambda: None
            broker.rules.networks = ("elsewhere",)
            broker.generation.advance()

        broker.rules.engine.on_decide = once
        await broker.service.sign(broker.asker, ask())
        seen = [json.loads(request)["caller"]["networks"] for request in broker.rules.engine.asked]
        assert seen == [["loopback"], ["elsewhere"]]
        intent = next(record for record in broker.records() if record["kind"] == "intent")
        assert intent["request"]["caller"]["networks"] == ["elsewhere"]

    with_broker(tmp_path, test)


def test_signature_is_withheld_when_rules_change_while_the_token_works(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def freeze() -> None:
            broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, ("denied-by:incident",)
            broker.generation.advance()

        broker.tokens.on_sign = freeze
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, ask())
        assert broker.tokens.signed == 1
        assert broker.kinds() == ["intent", "withheld"]

    with_broker(tmp_path, test)


@pytest.mark.case(7)
@pytest.mark.case(8)
def test_signature_is_withheld_when_the_svid_is_refused_while_the_token_works(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def deny() -> None:
            broker.validator.refuses = True
            broker.generation.advance()

        broker.tokens.on_sign = deny
        with pytest.raises(SvidInvalidError):
            await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["intent", "withheld"]

    with_broker(tmp_path, test)


def test_signature_is_released_when_rules_change_and_still_allow(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def change() -> None:
            broker.generation.advance()

        broker.tokens.on_sign = change
        await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["intent", "signed"]

    with_broker(tmp_path, test)


def test_unknown_key_is_not_found_even_when_rules_allow_every_key(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(NotFoundError):
            await broker.service.sign(broker.asker, Sign("nothing", BODY))
        assert broker.kinds() == ["denial"]

    with_broker(tmp_path, test)


@pytest.mark.case(15)
def test_algorithm_that_the_key_cannot_do_is_invalid_and_names_the_field(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(InvalidError) as caught:
            await broker.service.sign(broker.asker, ask(body=SignBody(algorithm=Algorithm.PS256, message=MESSAGE)))
        assert caught.value.pointers == (("/algorithm", "this key does ES256"),)
        assert broker.kinds() == ["denial"]

    with_broker(tmp_path, test)


def test_body_is_checked_again_behind_the_frontend(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        with pytest.raises(InvalidError):
            await broker.service.sign(broker.asker, ask(body=SignBody(algorithm=Algorithm.ES256)))
        assert broker.tokens.signed == 0

    with_broker(tmp_path, test)


def test_hsm_unavailable_before_the_intent_is_a_recorded_denial(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.tokens.available = False
        with pytest.raises(HsmUnavailableError):
            await broker.service.sign(broker.asker, ask())
        assert broker.kinds() == ["denial"]

    with_broker(tmp_path, test)


@pytest.mark.case(20)
def test_same_idempotency_key_and_body_get_the_same_use_when_asked_at_once_or_later(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        replies = await asyncio.gather(*(broker.service.sign(broker.asker, ask(idempotency_key="k1")) for _ in range(8)))
        first, *others = map(released, replies)
        later = released(await broker.service.sign(broker.asker, ask(idempotency_key="k1")))
        assert all(other == first for other in [*others, later])
        kinds = broker.kinds()
        assert (kinds.count("intent"), kinds.count("signed"), kinds.count("read")) == (1, 1, 8)
        assert {record["retry_of"] for record in broker.records() if record["kind"] == "read"} == {first.use}
        assert broker.tokens.signed == 1

    with_broker(tmp_path, test)


@pytest.mark.case(20)
def test_same_idempotency_key_with_another_body_is_a_mismatch(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask(idempotency_key="k1"))
        with pytest.raises(IdempotencyMismatchError):
            await broker.service.sign(broker.asker, ask(idempotency_key="k1", body=SignBody(algorithm=Algorithm.ES256, message=b"other")))
        assert broker.tokens.signed == 1

    with_broker(tmp_path, test)


def test_idempotent_answer_is_refused_when_rules_no_longer_allow(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        await broker.service.sign(broker.asker, ask(idempotency_key="k1"))
        broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, ("denied-by:incident",)
        with pytest.raises(DeniedError):
            await broker.service.sign(broker.asker, ask(idempotency_key="k1"))

    with_broker(tmp_path, test)


@pytest.mark.case(55)
def test_retry_of_an_unknown_use_is_one_new_intent_that_names_it(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.tokens.fault = SigningFailedError("timeout", may_have_signed=True)
        with pytest.raises(HsmTimeoutError):
            await broker.service.sign(broker.asker, ask(idempotency_key="k1"))
        broker.tokens.fault = None
        signed = released(await broker.service.sign(broker.asker, ask(idempotency_key="k1")))
        lost, _, retry, _ = broker.records()
        assert retry["retry_of"] == lost["use"] != signed.use == retry["use"]

    with_broker(tmp_path, test)


def test_idempotency_key_survives_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        async with fake_broker(tmp_path) as broker:
            first = released(await broker.service.sign(broker.asker, ask(idempotency_key="k1")))
        async with fake_broker(tmp_path) as broker:
            assert await broker.service.sign(broker.asker, ask(idempotency_key="k1")) == first
            broker.clock.time_us += 25 * 3600 * 1_000_000
            later = released(await broker.service.sign(broker.asker, ask(idempotency_key="k1", body=BODY)))
            assert later.use != first.use

    asyncio.run(main())


def test_batch_answers_each_item_in_order_and_records_each(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        items = tuple(SignBody(algorithm=Algorithm.ES256, message=bytes([n])) for n in range(20))
        bad = SignBody(algorithm=Algorithm.ES256, digest=b"short")
        results = await broker.service.sign_batch(broker.asker, SignBatch("orders", (*items[:10], bad, *items[10:])))
        assert [type(result) for result in results] == [Signed] * 10 + [Problem] + [Signed] * 10
        assert broker.kinds().count("signed") == 20

    with_broker(tmp_path, test)


@pytest.mark.case(7)
@pytest.mark.case(8)
def test_items_of_a_batch_that_had_to_wait_are_those_of_a_caller_who_is_still_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_USES_PER_BATCH", 2)

    async def test(broker: FakeBroker) -> None:
        async def deny() -> None:
            if broker.tokens.signed == 1:  # the second is under way
                broker.validator.refuses = True
                broker.generation.advance()

        broker.tokens.on_sign = deny
        results = await broker.service.sign_batch(broker.asker, SignBatch("orders", (ask().body,) * 6))
        assert [isinstance(each, Signed) for each in results[2:]] == [False] * 4
        assert {each.code for each in results[2:] if isinstance(each, Problem)} == {"svid-invalid"}
        assert broker.kinds().count("intent") == 2

    with_broker(tmp_path, test)


@pytest.mark.case(26)
def test_items_of_a_batch_that_had_to_wait_are_asked_with_the_networks_of_the_new_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAX_USES_PER_BATCH", 1)

    async def test(broker: FakeBroker) -> None:
        async def change() -> None:
            broker.rules.networks = ("elsewhere",)
            broker.generation.advance()

        broker.tokens.on_sign = change
        await broker.service.sign_batch(broker.asker, SignBatch("orders", (ask().body,) * 3))
        seen = [record["request"]["caller"]["networks"] for record in broker.records() if record["kind"] == "intent"]
        assert seen == [["loopback"], ["elsewhere"], ["elsewhere"]]

    with_broker(tmp_path, test)


@pytest.mark.case(7)
def test_second_with_an_idempotency_key_is_of_a_caller_who_is_still_known_when_the_first_has_ended(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        async def fail() -> None:
            broker.validator.refuses = True
            broker.tokens.fault = SigningFailedError("CKR_DEVICE_ERROR", may_have_signed=False)
            await asyncio.sleep(0)

        broker.tokens.on_sign = fail
        both = (broker.service.sign(broker.asker, ask(idempotency_key="k")) for _ in range(2))
        first, second = await asyncio.gather(*both, return_exceptions=True)
        assert isinstance(first, HsmUnavailableError)
        assert isinstance(second, SvidInvalidError)
        assert broker.kinds().count("intent") == 1

    with_broker(tmp_path, test)


def test_explain_uses_no_key_and_is_on_record(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        reply = await broker.service.explain(broker.asker, Explain("orders", BODY))
        assert reply.allow
        assert broker.kinds() == ["read"]
        assert broker.tokens.signed == 0

    with_broker(tmp_path, test)


def test_explain_says_why_not_where_a_grant_does_not_cover(tmp_path: Path) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.verdict, broker.rules.engine.reasons = Verdict.DENY, ("algorithm-not-granted",)
        reply = await broker.service.explain(broker.asker, Explain("orders", BODY))
        assert (reply.allow, reply.reasons) == (False, ("algorithm-not-granted",))

    with_broker(tmp_path, test)


@pytest.mark.parametrize("verdict", [Verdict.DENY, Verdict.FAILED])
def test_explain_is_refused_without_any_grant_or_decision(tmp_path: Path, verdict: Verdict) -> None:
    async def test(broker: FakeBroker) -> None:
        broker.rules.engine.verdict, broker.rules.engine.reasons = verdict, (NO_GRANT,)
        with pytest.raises(NotFoundError if verdict is Verdict.DENY else PolicyFailedError):
            await broker.service.explain(broker.asker, Explain("orders", BODY))
        assert broker.kinds() == ["denial"]

    with_broker(tmp_path, test)
