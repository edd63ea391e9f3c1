"""The routes of operations: which request reaches the authority as which ask, and what everything else gets."""

from __future__ import annotations

import json

import pytest

from keybroker.errors import NotFoundError
from keybroker.model.call import Approve, BatchReply, ListOperations, Problem, Redeem, ShowOperation
from tests.integration.frontend.fake_authority import OPERATION, PENDING, SIGNED
from tests.integration.frontend.served import Answered, Served, request, sign
from tests.integration.frontend.test_http_routes import BODY, only, problem

PLACE = f"/v1/operations/{OPERATION.id}"
ENVELOPE = {"payload": "aGk=", "payloadType": "text/plain", "signatures": [{"keyid": "ab" * 32, "sig": "aGk="}]}
CANONICAL = b'{"payload":"aGk=","payloadType":"text/plain","signatures":[{"keyid":"%s","sig":"aGk="}]}' % (b"ab" * 32)

READ = {
    "/v1/operations": ListOperations(),
    "/v1/operations?state=ready&limit=7": ListOperations("ready", limit=7),
    "/v1/operations?wait=30&mark=abc": ListOperations(wait_s=30, mark="abc"),
    PLACE: ShowOperation(OPERATION.id),
    f"{PLACE}?wait=3": ShowOperation(OPERATION.id, 3),
}


def post(served: Served, target: str, body: bytes, *fields: str) -> Answered:
    fields = fields or ("Content-Type: application/json",)
    return only(served.ask(request(target, *fields, method="POST", body=body, close=True)))


@pytest.mark.parametrize("target", READ)
def test_read_reaches_the_authority_as_one_ask(served: Served, target: str) -> None:
    answer = only(served.ask(request(target, close=True)))
    assert answer.status == 200
    assert served.authority.asked == [READ[target]]


@pytest.mark.parametrize("target", READ)
def test_read_of_what_is_not_there_is_404(served: Served, target: str) -> None:
    served.authority.answers = lambda _call: Problem.of(NotFoundError("Somewhere else."))
    assert "Somewhere" not in str(problem(only(served.ask(request(target, close=True))), 404, "not-found"))


@pytest.mark.parametrize(
    "query", ["wait=31", "wait=-1", "wait=1.5", "wait=1&wait=2", "state=open", "limit=0", "limit=101", f"mark={'x' * 65}", "other=1"]
)
def test_query_that_is_not_understood_is_422_and_asked_of_nobody(served: Served, query: str) -> None:
    problem(only(served.ask(request(f"/v1/operations?{query}", close=True))), 422, "invalid")
    assert served.authority.asked == []


def test_operation_is_shown_whole(served: Served) -> None:
    shown = json.loads(only(served.ask(request(PLACE, close=True))).body)
    assert shown["subject"]["operation"] == {"id": OPERATION.id, "kind": "sign-digest"}
    assert shown["stages"] == [{"name": "release/1", "approvals": 2, "of": ["managers"], "given": ["alice"], "is_open": True}]
    assert (shown["person"], shown["yours"], shown["approvals"][0]["counts"]) == ("bob", ["release/1"], True)


@pytest.mark.parametrize("indent", [None, 2])
def test_approval_reaches_the_authority_in_canonical_form(served: Served, indent: int | None) -> None:
    assert post(served, f"{PLACE}/approvals", json.dumps(ENVELOPE, indent=indent).encode()).status == 200
    assert served.authority.asked == [Approve(OPERATION.id, CANONICAL)]


@pytest.mark.case(12)
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "malformed"),
        (b"{", 400, "malformed"),
        (b'{"payload":"","payload":""}', 400, "malformed"),
        (CANONICAL.replace(b'"payload":', b'"payload":"","payload":', 1), 400, "malformed"),
        (b"{}", 422, "invalid"),
        (b"[]", 422, "invalid"),
        (CANONICAL.replace(b"}]}", b'}],"more":1}'), 422, "invalid"),
        (CANONICAL.replace(b'"aGk="', b'"aGk"', 1), 422, "invalid"),
        (CANONICAL.replace(b"ab", b"AB"), 422, "invalid"),
        (b'{"a":"' + b"x" * 33_000 + b'"}', 413, "too-large"),
    ],
)
def test_body_that_is_no_envelope_is_asked_of_nobody(served: Served, body: bytes, status: int, code: str) -> None:
    problem(post(served, f"{PLACE}/approvals", body), status, code)
    assert served.authority.asked == []


def test_redemption_reaches_the_authority_as_one_ask(served: Served) -> None:
    answer = post(served, f"{PLACE}/redeem", b'{"message":"aGk="}', "Content-Type: application/json", "Idempotency-Key: k-1")
    assert (answer.status, json.loads(answer.body)["use"]) == (200, SIGNED.use)
    assert post(served, f"{PLACE}/redeem", b"{}").status == 200
    assert post(served, f"{PLACE}/redeem", b'{"message":""}').status == 200
    assert served.authority.asked == [Redeem(OPERATION.id, b"hi", "k-1"), Redeem(OPERATION.id), Redeem(OPERATION.id, b"")]


@pytest.mark.case(14)
@pytest.mark.parametrize(
    ("body", "pointer"),
    [(b'{"message":"aGk"}', "/message"), (b'{"message":"aGl="}', "/message"), (b'{"digest":"aGk="}', "/digest"), (b"1", "")],
)
def test_redemption_that_is_not_understood_is_422(served: Served, body: bytes, pointer: str) -> None:
    document = problem(post(served, f"{PLACE}/redeem", body), 422, "invalid")
    assert document["errors"] == [{"pointer": pointer, "detail": document["errors"][0]["detail"]}]  # type: ignore[index]  # a list
    assert served.authority.asked == []


@pytest.mark.parametrize("what", ["approvals", "redeem"])
def test_body_must_call_itself_json_and_be_posted(served: Served, what: str) -> None:
    problem(post(served, f"{PLACE}/{what}", b"{}", "Content-Type: text/plain"), 415, "unsupported-media-type")
    problem(only(served.ask(request(f"{PLACE}/{what}", close=True))), 405, "method-not-allowed")
    problem(post(served, f"{PLACE}/other", b"{}"), 404, "not-found")
    assert served.authority.asked == []


@pytest.mark.case(28)
def test_use_that_waits_is_202_wherever_it_was_asked_for(served: Served) -> None:
    served.authority.answers = lambda _call: PENDING
    for answer in (only(served.ask(sign(BODY, close=True))), post(served, f"{PLACE}/redeem", b"{}")):
        assert answer.status == 202
        shown = json.loads(answer.body)
        assert shown["operation"] == OPERATION.id
        assert shown["needs"]["stages"][0]["approvals"] == 2
    served.authority.answers = lambda _call: BatchReply((PENDING, SIGNED))
    answer = only(served.ask(sign(b'{"items":[%s,%s]}' % (BODY, BODY), target="/v1/keys/orders/sign/batch", close=True)))
    assert answer.status == 200
    assert [set(each) & {"operation", "signature"} for each in json.loads(answer.body)["results"]] == [{"operation"}, {"signature"}]
