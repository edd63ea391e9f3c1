"""What is asked, byte by byte, and what is made of the answers. Nothing is sent."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keybroker.client import AUTO, BrokerAnswerError, OperationPage, SignBody, asks
from keybroker.client.asks import Ask
from keybroker.errors import DeniedError, InvalidError, RefusalError
from keybroker.model.approval import SubjectOperation
from keybroker.model.key import KEY_NAME, Algorithm
from tests.approvals import OPERATION, operation, subject

SIGNED = {
    "signature": "AAE=", "key": "orders", "version": 3, "algorithm": "ES256", "use": "01J",
    "records": {"log": "example.org/1", "intent": 812, "outcome": 813},
}  # fmt: skip


@pytest.mark.parametrize(
    ("ask", "target"),
    [
        (asks.whoami(), "/v1/whoami"),
        (asks.keys(), "/v1/keys"),
        (asks.key("orders"), "/v1/keys/orders"),
        (asks.public_key("a.b_c-d"), "/v1/keys/a.b_c-d/public?format=pem"),
        (asks.public_key("orders", "jwk", 2), "/v1/keys/orders/public?format=jwk&version=2"),
        (asks.jwks(), "/v1/jwks"),
        (asks.records(), "/v1/audit/records?limit=100"),
        (asks.records(limit=7, cursor="12", kind="", key="k"), "/v1/audit/records?key=k&cursor=12&limit=7"),
        (asks.records(since="2026-01-01T00:00:00+02:00", limit=1), "/v1/audit/records?since=2026-01-01T00%3A00%3A00%2B02%3A00&limit=1"),
        (asks.record(7), "/v1/audit/records/7"),
        (asks.operations(), "/v1/operations?limit=100"),
        (asks.operations(state="pending", wait_s=30, mark="a b", limit=7), "/v1/operations?limit=7&state=pending&mark=a+b&wait=30"),
        (asks.operation(OPERATION.id), f"/v1/operations/{OPERATION.id}"),
        (asks.operation(OPERATION.id, wait_s=5), f"/v1/operations/{OPERATION.id}?wait=5"),
    ],
)
def test_reading_is_a_get_that_may_be_repeated(ask: Ask[Any], target: str) -> None:
    assert (ask.method, ask.target, ask.body, ask.is_repeatable, ask.headers) == ("GET", target, b"", True, [])


def test_signing_is_a_post_that_may_not_be_repeated() -> None:
    ask = asks.sign("orders", "ES256", message=b"\0\1", format="p1363", reason="r", media_type="text/plain")
    assert (ask.method, ask.target, ask.is_repeatable) == ("POST", "/v1/keys/orders/sign", False)
    assert ask.headers == [("Content-Type", "application/json")]
    assert json.loads(ask.body) == {
        "algorithm": "ES256", "message": "AAE=", "format": "p1363", "reason": "r", "media_type": "text/plain",
    }  # fmt: skip


def test_approvals_are_posts_that_may_be_repeated_and_redemptions_only_with_an_idempotency_key() -> None:
    given = asks.give_approval(OPERATION.id, b'{"payload":""}')
    assert (given.method, given.target, given.body) == ("POST", f"/v1/operations/{OPERATION.id}/approvals", b'{"payload":""}')
    redeemed = asks.redeem(OPERATION.id)
    assert (redeemed.method, redeemed.target, redeemed.body) == ("POST", f"/v1/operations/{OPERATION.id}/redeem", b"{}")
    assert asks.redeem(OPERATION.id, message=b"\0\1").body == b'{"message":"AAE="}'
    assert given.is_repeatable  # the same approval twice is one
    assert not redeemed.is_repeatable
    assert asks.redeem(OPERATION.id, idempotency_key=AUTO).is_repeatable


@pytest.mark.parametrize("id_", ["", "../keys", f"{OPERATION.id}/redeem", f"{OPERATION.id}\n", OPERATION.id.lower(), "9" * 26])
def test_text_that_is_no_operation_is_refused_before_anything_is_sent(id_: str) -> None:
    for ask in (lambda: asks.operation(id_), lambda: asks.redeem(id_), lambda: asks.give_approval(id_, b"{}")):
        with pytest.raises(InvalidError, match="is not an operation"):
            ask()


@pytest.mark.parametrize("wait_s", [-1, 31])
def test_wait_that_no_broker_grants_is_refused(wait_s: int) -> None:
    for ask in (lambda: asks.operation(OPERATION.id, wait_s=wait_s), lambda: asks.operations(wait_s=wait_s)):
        with pytest.raises(InvalidError, match="0 to 30 seconds"):
            ask()


def test_operation_is_what_the_broker_shows_of_the_one_that_was_asked_for() -> None:
    assert asks.operation(OPERATION.id).decode(msgspec.json.encode(OPERATION)) == OPERATION
    page = msgspec.json.encode({"operations": [OPERATION], "mark": "7"})
    assert asks.operations().decode(page) == OperationPage((OPERATION,), "7")
    other = subject(operation=SubjectOperation("01JDGQ4F8M3Z6T9W2X5Y7ZZZZZ", "sign"))
    for wrong in (operation(subject=other), operation(id=other.operation.id), operation(id=other.operation.id, subject=other)):
        with pytest.raises(BrokerAnswerError, match="another operation"):
            asks.operation(OPERATION.id).decode(msgspec.json.encode(wrong))


def test_subject_with_a_member_that_is_not_known_is_not_shown_let_alone_approved() -> None:
    value = msgspec.to_builtins(OPERATION)
    value["subject"]["urgent"] = True
    with pytest.raises(BrokerAnswerError, match="not one that this version understands"):
        asks.operation(OPERATION.id).decode(msgspec.json.encode(value))


def test_signing_may_be_repeated_with_an_idempotency_key() -> None:
    ask = asks.sign("orders", Algorithm.ES256, digest=bytes(32), idempotency_key="release-7")
    assert ask.is_repeatable
    assert ("Idempotency-Key", "release-7") in ask.headers
    assert json.loads(ask.body) == {"algorithm": "ES256", "digest": base64.b64encode(bytes(32)).decode()}


def test_automatic_idempotency_keys_are_good_ones_and_never_the_same() -> None:
    keys = {asks.sign("orders", "ES256", message=b"x", idempotency_key=AUTO).idempotency_key for _ in range(100)}
    keys |= {asks.sign_batch("orders", [], idempotency_key=AUTO).idempotency_key for _ in range(100)}
    assert len(keys) == 200
    assert all(re.fullmatch("[A-Za-z0-9_-]{20,64}", key) for key in keys)


def test_explaining_and_a_batch_are_not_repeated_by_themselves() -> None:
    assert not asks.explain("orders", "ES256", message=b"x").is_repeatable
    batch = asks.sign_batch("orders", [SignBody(algorithm=Algorithm.ES256, message=b"x")])
    assert not batch.is_repeatable
    assert json.loads(batch.body) == {"items": [{"algorithm": "ES256", "message": "eA=="}]}


def test_payload_stays_out_of_what_is_printed() -> None:
    ask = asks.sign("orders", "ES256", message=b"secret", idempotency_key="k")
    assert "secret" not in repr(ask)
    assert base64.b64encode(b"secret").decode() not in repr(ask)


@pytest.mark.case(19)
@settings(deadline=None)
@given(name=st.text(max_size=80) | st.sampled_from(["..", "a/b", "a%2fb", "a?b", "a#b", "A", "", "a\n", "a b", "ä", "'--"]))
def test_no_name_leads_to_another_route(name: str) -> None:
    if KEY_NAME.fullmatch(name):
        assert asks.key(name).target == f"/v1/keys/{name}"
        return
    for ask in (asks.key, asks.public_key, lambda key: asks.sign(key, "ES256", message=b"x"), lambda key: asks.sign_batch(key, [])):
        with pytest.raises(InvalidError):
            ask(name)


@settings(deadline=None)
@given(value=st.text(min_size=1, max_size=40))
def test_no_filter_adds_a_parameter_of_its_own(value: str) -> None:
    try:
        target = asks.records(workload=value, limit=1).target
    except UnicodeEncodeError:
        return  # a lone surrogate has no bytes
    assert re.fullmatch(r"/v1/audit/records\?workload=[A-Za-z0-9_.~%+-]+&limit=1", target)


def test_answers_become_values() -> None:
    signed = asks.sign("orders", "ES256", message=b"x").decode(msgspec.json.encode(SIGNED))
    assert (signed.signature, signed.version, signed.records.outcome) == (b"\0\1", 3, 813)
    assert asks.public_key("orders").decode(b"-----BEGIN") == "-----BEGIN"
    assert asks.jwks().decode(b'{"keys": []}') == {"keys": []}
    explanation = asks.explain("orders", "ES256", message=b"x").decode(b'{"allow": false, "reasons": ["no-grant"], "more": 1}')
    assert not explanation.allow


def test_batch_answers_are_values_and_refusals_in_their_order() -> None:
    items = [SignBody(algorithm=Algorithm.ES256, message=b"x")] * 2
    denied = {"type": "urn:keybroker:problem:denied", "detail": "No."}
    refused, signed = asks.sign_batch("orders", items).decode(msgspec.json.encode({"results": [denied, SIGNED]}))
    assert isinstance(refused, DeniedError)
    assert not isinstance(signed, RefusalError)


DECODERS: dict[str, Ask[Any]] = {
    "whoami": asks.whoami(), "keys": asks.keys(), "key": asks.key("k"), "jwks": asks.jwks(), "public": asks.public_key("k"),
    "sign": asks.sign("k", "ES256", message=b"x"), "explain": asks.explain("k", "ES256", message=b"x"), "records": asks.records(),
    "operation": asks.operation(OPERATION.id), "operations": asks.operations(), "redeem": asks.redeem(OPERATION.id),
    "record": asks.record(1), "batch": asks.sign_batch("k", [SignBody(algorithm=Algorithm.ES256, message=b"x")]),
}  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["results", "records", "next", "type", "key", "x"]), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(data=st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), what=st.sampled_from(sorted(DECODERS)))
def test_no_answer_is_anything_but_a_value_or_an_error_of_its_own(data: bytes, what: str) -> None:
    try:
        DECODERS[what].decode(data)
    except BrokerAnswerError:
        pass
    else:
        assert what in {"jwks", "public", "records", "keys", "batch", "explain"}
