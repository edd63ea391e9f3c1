"""Which request reaches the authority as which ask, and what everything else gets."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from keybroker.errors import DeniedError, FrozenError, SvidInvalidError
from keybroker.model.call import (
    AskFreeze,
    AskUnfreeze,
    Explain,
    ListFreezes,
    ListJwks,
    ListKeys,
    Problem,
    ProposePolicy,
    QueryRecords,
    ShowKey,
    ShowPolicy,
    ShowRecord,
    Sign,
    SignBatch,
    Whoami,
)
from keybroker.model.key import Algorithm
from keybroker.model.request import SignBody
from tests.integration.frontend.fake_authority import FREEZE
from tests.integration.frontend.served import WORKLOAD, Answered, Served, authority, current, request, sign

BODY = b'{"algorithm":"ES256","message":"aGk="}'
SIGN_BODY = SignBody(algorithm=Algorithm.ES256, message=b"hi")
ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")


def only(answers: list[Answered]) -> Answered:
    (answer,) = answers
    return answer


def problem(answer: Answered, status: int, code: str) -> dict[str, object]:
    """The document of a problem, which is whole."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
    document: dict[str, object] = json.loads(answer.body)
    assert document["type"] == f"urn:keybroker:problem:{code}"
    assert document["status"] == status
    assert ULID.fullmatch(str(document["instance"]).removeprefix("urn:keybroker:request:"))
    return document


ASKED = {
    "/v1/whoami": Whoami(),
    "/v1/keys": ListKeys(),
    "/v1/keys/orders": ShowKey("orders"),
    "/v1/jwks": ListJwks(),
    "/v1/audit/records": QueryRecords(),
    "/v1/audit/records?limit=7&key=orders": QueryRecords(limit=7, key="orders"),
    "/v1/audit/records/7": ShowRecord(7),
}


@pytest.mark.parametrize("target", ASKED)
def test_read_reaches_the_authority_as_one_ask(served: Served, target: str) -> None:
    assert only(served.ask(request(target, close=True))).status == 200
    assert served.authority.asked == [ASKED[target]]


@pytest.mark.parametrize("target", ASKED)
def test_read_gets_403_and_the_reasons_if_the_authority_denies(served: Served, target: str) -> None:
    served.authority.answers = lambda _call: Problem.of(DeniedError("No.", reasons=("no-grant",)))
    document = problem(only(served.ask(request(target, close=True))), 403, "denied")
    assert document["reasons"] == ["no-grant"]
    assert document["instance"] == f"urn:keybroker:request:{served.authority.calls[0].request_id}"


def test_sign_reaches_the_authority_as_one_ask(served: Served) -> None:
    answer = only(served.ask(sign(BODY, "Idempotency-Key: k-1", close=True)))
    assert (answer.status, json.loads(answer.body)["signature"]) == (200, "c2lnbmF0dXJl")
    assert served.authority.asked == [Sign("orders", SIGN_BODY, "k-1")]


def test_batch_reaches_the_authority_as_one_ask_of_what_can_be_read(served: Served) -> None:
    body = b'{"items":[%s,{"algorithm":"ES256"},%s]}' % (BODY, BODY)
    answer = only(served.ask(sign(body, target="/v1/keys/orders/sign/batch", close=True)))
    first, second, third = json.loads(answer.body)["results"]
    assert (first["key"], second["status"], third["key"]) == ("orders", 422, "orders")
    assert second["errors"][0]["pointer"] == "/items/1"
    assert served.authority.asked == [SignBatch("orders", (SIGN_BODY, SIGN_BODY))]


def test_explain_reaches_the_authority_as_one_ask(served: Served) -> None:
    assert only(served.ask(sign(BODY, target="/v1/keys/orders/sign/explain", close=True))).status == 200
    assert served.authority.asked == [Explain("orders", SIGN_BODY)]


FROZEN = {
    b'{"key":"orders","reason":"incident 7"}': AskFreeze("key", "orders", "incident 7"),
    b'{"reason":"7","workload":"spiffe://example.org/a"}': AskFreeze("workload", "spiffe://example.org/a", "7"),
    b'{"token":"main","reason":"7"}': AskFreeze("token", "main", "7"),
    b'{"everything":true,"reason":"7"}': AskFreeze("everything", "", "7"),
}
FREEZES = "/v1/freezes"


def freeze(body: bytes) -> bytes:
    return request(FREEZES, "Content-Type: application/json", method="POST", body=body, close=True)


@pytest.mark.parametrize("body", FROZEN)
def test_freeze_reaches_the_authority_as_one_ask(served: Served, body: bytes) -> None:
    answer = only(served.ask(freeze(body)))
    assert (answer.status, json.loads(answer.body)["id"]) == (200, FREEZE.id)
    assert served.authority.asked == [FROZEN[body]]


def test_freezes_are_listed_and_lifted_by_id(served: Served) -> None:
    listed = only(served.ask(request(FREEZES, close=True)))
    assert json.loads(listed.body)["freezes"][0]["reason"] == "incident 7"
    assert only(served.ask(request(f"{FREEZES}/{FREEZE.id}", method="DELETE", close=True))).status == 200
    problem(only(served.ask(request(f"{FREEZES}/other", method="DELETE", close=True))), 404, "not-found")
    assert served.authority.asked == [ListFreezes(), AskUnfreeze(FREEZE.id)]


@pytest.mark.case(14)
@pytest.mark.parametrize(
    ("body", "status", "code", "pointer"),
    [
        (b'{"key":"orders"}', 422, "invalid", "/reason"),
        (b'{"reason":"7"}', 422, "invalid", ""),
        (b'{"reason":"7","everything":false}', 422, "invalid", ""),
        (b'{"reason":"7","everything":true,"key":"orders"}', 422, "invalid", ""),
        (b'{"reason":"7","key":["orders"]}', 422, "invalid", "/key"),
        (b'{"reason":"7","key":"orders","for":"1h"}', 422, "invalid", "/for"),
        (b'{"reason":"7","key":"orders","key":"other"}', 400, "malformed", None),
        (b'{"reason":"\\ud800","key":"orders"}', 400, "malformed", None),
        (b"", 400, "malformed", None),
    ],
)
def test_freeze_that_cannot_be_read_asks_nothing(served: Served, body: bytes, status: int, code: str, pointer: str | None) -> None:
    document = problem(only(served.ask(freeze(body))), status, code)
    if pointer is not None:
        assert document["errors"][0]["pointer"] == pointer  # type: ignore[index]  # there are some
    assert not served.authority.calls


def test_rules_are_shown_and_proposals_reach_the_authority_as_one_ask(served: Served) -> None:
    body = b'{"base":"00","files":{"a.yaml":"grants: []"},"reason":"less"}'
    shown = only(served.ask(request("/v1/admin/policy", close=True)))
    assert json.loads(shown.body)["files"] == {"a.yaml": "grants: []"}
    data = request("/v1/admin/policy/changes", "Content-Type: application/json", method="POST", body=body, close=True)
    assert json.loads(only(served.ask(data)).body)["revision"] == 2
    assert served.authority.asked == [ShowPolicy(), ProposePolicy("00", {"a.yaml": "grants: []"}, "less")]


def test_proposal_may_be_larger_than_what_is_signed_and_not_without_bound(served: Served) -> None:
    for size, status in ((1_500_000, 200), (4_000_000, 413)):
        body = b'{"base":"00","files":{"a.yaml":"%s"},"reason":"less"}' % (b"x" * size)
        data = request("/v1/admin/policy/changes", "Content-Type: application/json", method="POST", body=body, close=True)
        assert only(served.ask(data)).status == status


@pytest.mark.case(72)
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("DELETE", "/v1/audit/records"), ("DELETE", "/v1/audit/records/1"), ("PUT", "/v1/audit/records/1"), ("POST", "/v1/audit/records"),
        ("POST", "/v1/admin/audit/disable"), ("DELETE", "/v1/admin/workloads/x"), ("GET", "/v1/admin/pin"), ("GET", "/v1/keys/orders/pin"),
        ("GET", "/v1/keys/orders/private"), ("POST", "/v1/keys/orders/export"), ("GET", "/v1/admin/tokens/main/pin"),
    ],
)  # fmt: skip
def test_there_is_no_way_to_switch_the_record_off_delete_from_it_or_read_a_pin(served: Served, method: str, target: str) -> None:
    answer = only(served.ask(request(target, method=method, body=b"{}" if method in {"POST", "PUT"} else None, close=True)))
    assert answer.status in {404, 405}
    assert not served.authority.calls


@pytest.mark.case(14)
@pytest.mark.parametrize("seconds", [b"0", b"-1", b"86401", b"18446744073709551616", b"1e3", b"1.5", b'"60"', b"null", b"true"])
def test_time_for_broken_glass_that_is_none_gets_422(served: Served, seconds: bytes) -> None:
    body = b'{"grant":"release","reason":"7","seconds":%s}' % seconds
    data = request("/v1/break-glass", "Content-Type: application/json", method="POST", body=body, close=True)
    document = problem(only(served.ask(data)), 422, "invalid")
    assert document["errors"] == [{"pointer": "/seconds", "detail": "a whole number from 1 to 86400"}]
    assert not served.authority.calls


def test_frozen_gets_423_and_says_what_is_frozen(served: Served) -> None:
    served.authority.answers = lambda _call: Problem.of(FrozenError("This key is frozen.", reasons=("frozen-key",)))
    assert problem(only(served.ask(sign(BODY, close=True))), 423, "frozen")["reasons"] == ["frozen-key"]


@pytest.mark.case(14)
@pytest.mark.parametrize(
    "fields",
    [
        [],
        ["Content-Type: text/plain"],
        ["Content-Type: application/json; charset=latin-1"],
        ["Content-Type: application/jsonp"],
        ["Content-Type: application/json", "Content-Type: application/json"],
        ["Content-Type: application/json, text/plain"],
    ],
)
def test_body_that_is_not_called_json_gets_415(served: Served, fields: list[str]) -> None:
    data = request("/v1/keys/orders/sign", *fields, method="POST", body=BODY, close=True)
    problem(only(served.ask(data)), 415, "unsupported-media-type")
    assert not served.authority.calls


@pytest.mark.case(12)
@pytest.mark.parametrize("route", ["sign", "sign/batch", "sign/explain"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe{\x00}\x00", b'{"a":' * 10_000, b"[" * 10_000, b'{"algorithm":NaN}', b'{"items":[{"a":"\\ud800"}]}']
)
def test_body_that_is_not_json_gets_400(served: Served, route: str, body: bytes) -> None:
    problem(only(served.ask(sign(body, target=f"/v1/keys/orders/{route}", close=True))), 400, "malformed")
    assert not served.authority.calls


@pytest.mark.parametrize("field", ["a b", "ä", "a" * 65, "", "a/b"])
def test_idempotency_key_that_is_none_gets_422(served: Served, field: str) -> None:
    document = problem(only(served.ask(sign(BODY, f"Idempotency-Key: {field}", close=True))), 422, "invalid")
    assert document["errors"]
    assert not served.authority.calls


def test_white_space_around_a_value_is_no_part_of_it(served: Served) -> None:
    data = request(
        "/v1/keys/orders/sign", "Content-Type:application/json \t", "Idempotency-Key: \tk-1 ", method="POST", body=BODY, close=True
    )
    assert only(served.ask(data)).status == 200
    assert served.authority.asked == [Sign("orders", SIGN_BODY, "k-1")]


def test_two_idempotency_keys_get_422(served: Served) -> None:
    problem(only(served.ask(sign(BODY, "Idempotency-Key: a", "Idempotency-Key: a", close=True))), 422, "invalid")
    assert not served.authority.calls


METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("target", "takes"), [("/v1/whoami", {"GET"}), ("/v1/keys/orders/sign", {"POST"}), ("/v1/openapi.json", {"GET", "HEAD"})]
)
def test_method_gets_405_and_what_is_allowed_unless_it_is(served: Served, method: str, target: str, takes: set[str]) -> None:
    answer = only(served.ask(request(target, method=method, body=b"" if method == "POST" else None, close=True), is_head=method == "HEAD"))
    assert (answer.status == 405) == (method not in takes)
    if method in takes:
        return
    assert set(answer.headers["allow"].split(", ")) == takes
    if method == "HEAD":
        assert not answer.body
    else:
        problem(answer, 405, "method-not-allowed")
    assert not served.authority.calls


@pytest.mark.parametrize(
    "target",
    ["/", "/v1", "/v1/", "/v1/whoami/", "//v1/whoami", "/v1//whoami", "/V1/whoami", "/v1/./whoami", "/v1/x/../whoami", "/v1/%77hoami",
     "/livez", "/metrics", "/docs", "/openapi.json", "/v1/audit/records/x", "/v1/audit/records/-1", "/v1/audit/records/9007199254740993",
     "/v1/audit/records/1_0", "/v1/audit/records/+1", "/v1/audit/records/01", "/v1/audit/records/1.0"],
)  # fmt: skip
def test_unknown_route_gets_404(served: Served, target: str) -> None:
    problem(only(served.ask(request(target, close=True))), 404, "not-found")
    assert not served.authority.calls


@pytest.mark.parametrize("route", ["sign", "sign/batch", "sign/explain"])
def test_query_parameter_of_a_route_that_signs_gets_422_and_nothing_is_asked(served: Served, route: str) -> None:
    target = f"/v1/keys/orders/{route}?format=p1363"
    document = problem(only(served.ask(sign(BODY, target=target, close=True))), 422, "invalid")
    assert document["errors"] == [{"pointer": "/format", "detail": "unknown"}]
    assert not served.authority.calls


@pytest.mark.parametrize(
    "target",
    ["/v1/whoami?a=1&a=2", "/v1/audit/records?limit=1&limit=2", "/v1/audit/records?limit=1&l%69mit=2", "/v1/audit/records?nothing=1",
     "/v1/audit/records?limit=0", "/v1/audit/records?limit=1001", "/v1/audit/records?limit=x", "/v1/audit/records?limit=07",
     "/v1/audit/records?limit=%2b7", "/v1/audit/records?kind=nothing",
     "/v1/audit/records?since=yesterday", "/v1/keys/orders/public?format=der", "/v1/keys/orders/public?version=0",
     "/v1/whoami?a", "/v1/whoami?=", "/v1/keys?format=pem", "/v1/keys/orders?version=1", "/v1/jwks?x=1", "/v1/audit/records/1?x=1",
     "/v1/openapi.json?x=1",
     "/v1/whoami?" + "&".join(f"a{number}" for number in range(101))],
)  # fmt: skip
def test_query_parameter_gets_422_if_repeated_unknown_or_wrong(served: Served, target: str) -> None:
    document = problem(only(served.ask(request(target, close=True))), 422, "invalid")
    assert document["errors"]
    assert not served.authority.calls


# What a broken reader would take for `orders`, for a file, for a query, or for a PKCS#11 URI of another object.
HOSTILE = [
    "order%73", "orders%2f", "orders%2fsign", "orders%00", "orders%20", "%2e%2e", "..", ".", "..;", "..%2forders", "x%2f..%2forders",
    "orders;", "orders;x=1", "orders'", "orders'--", "'or'1'='1", 'orders"', "orders%27", "orders,release", "*", "%2a", "orders*", "order_",
    "ORDERS", "Orders", "orders:", "orders;object=release", "pkcs11:object=orders", "object=orders;id=%01", "orders?x", "orders&",
    "$(orders)",
    "{key}", "orders%E2%80%AE", "orders%c0%af", "%6frders", "orders.", "orders-", "orders~1", "orders\\", "orders|", "orders`",
]  # fmt: skip


@pytest.mark.case(18)
@pytest.mark.case(19)
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("route", ["", "/public", "/sign"])
def test_hostile_name_never_reaches_the_authority_as_another_key(served: Served, name: str, route: str) -> None:
    target = f"/v1/keys/{name}{route}"
    is_sign = route == "/sign" and "?" not in name
    answer = only(served.ask(sign(BODY, target=target, close=True) if is_sign else request(target, close=True)))
    if name == "orders?x":  # the name ends where the query begins: this is `orders`, whichever way it is read
        assert all(ask == ShowKey("orders") for ask in served.authority.asked)
        return
    document = problem(answer, 404, "not-found")
    assert document["detail"] == "There is no such thing, or nothing of it is granted to you."
    assert name not in document.values()
    for ask in served.authority.asked:
        assert isinstance(ask, ShowKey | Sign)
        assert ask.key == name  # as it stands: not decoded, not cut, not folded


@pytest.mark.case(18)
def test_unknown_key_and_key_of_another_get_the_same_answer(served: Served) -> None:
    answers = [only(served.ask(sign(BODY, target=f"/v1/keys/{name}/sign", close=True))) for name in ("nothing", "release")]
    plain = [re.sub(rb"urn:keybroker:request:\w+", b"", answer.body) for answer in answers]
    assert [answer.status for answer in answers] == [404, 404]
    assert plain[0] == plain[1]
    assert answers[0].headers == answers[1].headers


@pytest.mark.case(10)
@pytest.mark.parametrize(
    "name", ["X-Forwarded-Client-Cert", "X-SPIFFE-ID", "X-Client-Cert", "X-SSL-Client-Cert", "Client-Cert", "Forwarded", "X-Forwarded-For"]
)
def test_identity_is_the_leaf_of_tls_whatever_a_header_says(served: Served, name: str) -> None:
    admin = "spiffe://example.org/human/admin"
    claims = {"Forwarded": "for=192.0.2.1", "X-Forwarded-For": "192.0.2.1", "X-SPIFFE-ID": admin}
    value = claims.get(name, f"By=spiffe://example.org/proxy;Hash=00;URI={admin}")
    answer = only(served.ask(request("/v1/whoami", f"{name}: {value}", close=True)))
    seen = json.loads(answer.body)
    assert (seen["spiffe_id"], seen["address"]) == (WORKLOAD, "127.0.0.1")
    (call,) = served.authority.calls
    assert str(served.authority.validator.validate(call.chain).id) == WORKLOAD
    assert "admin" not in repr(call)


@pytest.mark.case(10)
def test_authority_sees_the_chain_as_the_client_sent_it(served: Served) -> None:
    below = served.root.intermediate("below", shape=authority().shape)
    issued = below.issue(current(uris=("spiffe://example.org/other",)), ec.generate_private_key(ec.SECP256R1()))
    answer = only(served.ask(request(close=True), served.write_svid(issued)))
    assert json.loads(answer.body)["spiffe_id"] == "spiffe://example.org/other"
    assert served.authority.calls[0].chain == issued.chain


@pytest.mark.case(2)
def test_svid_that_tls_takes_and_the_authority_refuses_gets_401_and_the_end(served: Served) -> None:
    svid = served.write_svid(served.root.issue(current(uris=())))
    answer = only(served.ask(request() + request("/v1/keys"), svid))
    assert problem(answer, 401, "svid-invalid")["reasons"] == ["no-uri"]
    assert answer.headers["connection"] == "close"


@pytest.mark.case(7)
@pytest.mark.case(8)
@pytest.mark.parametrize("rule", ["expired", "no-path", "denied"])
def test_svid_that_is_good_no_longer_gets_401_and_the_end_on_the_next_request(served: Served, rule: str) -> None:
    with served.connected() as conversation:
        assert conversation.exchange(sign(BODY)).status == 200
        served.authority.answers = lambda _call: Problem.of(SvidInvalidError("No.", reasons=(rule,)))
        conversation.send(sign(BODY))
        answer = only(conversation.rest())
    assert problem(answer, 401, "svid-invalid")["reasons"] == [rule]
    assert answer.headers["connection"] == "close"


@pytest.mark.case(7)
def test_every_request_carries_the_chain_for_the_authority_to_judge_again(served: Served) -> None:
    with served.connected() as conversation:
        for _ in range(3):
            assert conversation.exchange(request()).status == 200
    validate = served.authority.validator.validate
    assert [str(validate(call.chain).id) for call in served.authority.calls] == [WORKLOAD] * 3
    assert len({call.chain for call in served.authority.calls}) == 1


@pytest.mark.parametrize(
    ("given", "carried"),
    [
        (["traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01"], "00-" + "a" * 32 + "-" + "b" * 16 + "-01"),
        (["traceparent: 00-" + "a" * 32 + "-" + "b" * 16 + "-01"] * 2, ""),
        (["traceparent: nonsense"], ""),
        ([], ""),
    ],
)
def test_trace_context_is_carried_if_it_is_one(served: Served, given: list[str], carried: str) -> None:
    served.ask(request("/v1/whoami", *given, close=True))
    assert served.authority.calls[0].traceparent == carried


def test_request_id_is_never_the_callers(served: Served) -> None:
    served.ask(request("/v1/whoami", "X-Request-ID: mine", close=True))
    assert ULID.fullmatch(served.authority.calls[0].request_id)


def test_thousand_requests_on_one_connection_are_answered_in_order(served: Served) -> None:
    with served.connected() as conversation:
        for number in range(500):
            assert conversation.exchange(request(f"/v1/audit/records/{number}")).status == 200
            assert conversation.exchange(sign(BODY)).status == 200
    assert served.authority.asked[0::2] == [ShowRecord(number) for number in range(500)]
    assert len({call.request_id for call in served.authority.calls}) == 1_000


def test_every_answer_says_that_no_cache_may_keep_it(served: Served, tmp_path: Path) -> None:
    assert not list(tmp_path.iterdir())
    for target in ("/v1/whoami", "/v1/keys", "/v1/openapi.json", "/nothing"):
        assert only(served.ask(request(target, close=True))).headers["cache-control"] == "no-store"
