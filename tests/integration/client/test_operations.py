"""Approvals over real TLS, both clients: what waits is an exception of its own, and what is handed in is signed by the caller's SVID."""

from __future__ import annotations

import json
import time

import msgspec
import pytest

from keybroker.audit import approval
from keybroker.client import BrokerAnswerError, Needs, NothingToApproveError, Pending, PendingError, SignBody, SignedUse, Stage, broker
from keybroker.clock import to_rfc3339
from keybroker.model.key import Algorithm
from tests.approvals import OPERATION, SUBJECT, operation, spki_of, subject
from tests.integration.client.servers import SIGNED, WORKLOAD, Connection, Kind, Place, every, facing, shape

PENDING = Pending(OPERATION.id, Needs((Stage("release-signing/1", 2, ("release-managers",), (), is_open=True),)), SUBJECT.expires)
OPEN = operation(subject=subject(expires=to_rfc3339((time.time_ns() // 1_000) + 3_600_000_000)))  # these tests use the real clock


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def accepted(connection: Connection, _request: bytes) -> None:
    connection.answer(msgspec.json.encode(PENDING), "202 Accepted")


def test_use_that_waits_for_approvals_is_an_exception_that_names_them(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context(), every(accepted)) as (server, client):
        for method, words in (("sign", {"key": "orders", "algorithm": "ES256", "message": b"x"}), ("redeem", {"id": OPERATION.id})):
            with pytest.raises(PendingError, match=r"2 more of release-managers \(release-signing/1\)") as caught:
                getattr(client, method)(**words, idempotency_key="k")
            assert caught.value.pending == PENDING
        assert len(server.requests) == 2  # it is an answer, and nothing to try again


@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b'{"operation": 1, "needs": {"stages": []}, "expires": ""}', b"\xff"])
def test_202_that_says_nothing_makes_no_sense(kind: Kind, place: Place, body: bytes) -> None:
    def answers(connection: Connection, _request: bytes) -> None:
        connection.answer(body, "202 Accepted")

    with facing(kind, place, place.server_context(), every(answers)) as (_, client), pytest.raises(BrokerAnswerError):
        client.sign("orders", "ES256", message=b"x")


def test_batch_tells_uses_from_uses_that_wait_and_from_refusals(kind: Kind, place: Place) -> None:
    problem = {"type": "urn:keybroker:problem:denied", "detail": "No."}

    def answers(connection: Connection, _request: bytes) -> None:
        connection.answer({"results": [SIGNED, msgspec.to_builtins(PENDING), problem]})

    items = [SignBody(algorithm=Algorithm.ES256, message=b"x")] * 3
    with facing(kind, place, place.server_context(), every(answers)) as (_, client):
        signed, pending, refused = client.sign_batch("orders", items)
    assert isinstance(signed, SignedUse)
    assert pending == PENDING
    assert refused.code == "denied"


@pytest.mark.parametrize("verdict", ["approve", "refuse"])
def test_what_is_handed_in_is_what_was_looked_at_signed_by_our_svid(kind: Kind, place: Place, verdict: str) -> None:
    issued = place.authority.issue(shape(WORKLOAD))
    place.write_svid(issued)

    def shows(connection: Connection, _request: bytes) -> None:
        connection.answer(msgspec.json.encode(OPEN))

    with facing(kind, place, place.server_context(), every(shows)) as (server, client):
        found = client.operation(OPERATION.id)
        assert getattr(client, verdict)(found) == OPEN
        assert len(server.requests) == 2
        head, _, envelope = server.requests[1].partition(b"\r\n\r\n")
    assert head.startswith(f"POST /v1/operations/{OPERATION.id}/approvals HTTP/1.1\r\n".encode())
    statement = approval.verified(envelope, spki_of(issued.key))  # type: ignore[arg-type]  # a P-256 key
    assert (statement.subject, statement.verdict, statement.approver) == (OPEN.subject, verdict, WORKLOAD)
    assert statement.confirmed == "yes-flag"


def test_nothing_is_sent_where_nothing_waits_for_us(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context()) as (server, client):
        with pytest.raises(NothingToApproveError):
            client.approve(operation(yours=()))
        assert server.accepted == 0


def test_wait_ends_as_soon_as_the_operation_is_decided(kind: Kind, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_PAUSE_S", 0.01)
    states = iter(["pending", "pending", "ready"])

    def shows(connection: Connection, _request: bytes) -> None:
        connection.answer(msgspec.json.encode(operation(state=next(states))))

    with facing(kind, place, place.server_context(), every(shows)) as (server, client):
        assert client.wait_for(OPERATION.id, timeout_s=60).state == "ready"
        assert all(b"?wait=30 " in request for request in server.requests)
        assert len(server.requests) == 3


def test_wait_ends_with_its_time(kind: Kind, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "_PAUSE_S", 0.01)

    def shows(connection: Connection, _request: bytes) -> None:
        connection.answer(msgspec.json.encode(OPERATION))

    with facing(kind, place, place.server_context(), every(shows)) as (server, client):
        assert client.wait_for(OPERATION.id, timeout_s=0.2).state == "pending"
        assert len(server.requests) < 30


def test_redemption_is_a_use_like_any_other(kind: Kind, place: Place) -> None:
    def signs(connection: Connection, _request: bytes) -> None:
        connection.answer(SIGNED)

    with facing(kind, place, place.server_context(), every(signs)) as (server, client):
        assert client.redeem(OPERATION.id, message=b"again", idempotency_key="k").signature == b"sig"
        assert json.loads(body_of(server.requests[0])) == {"message": "YWdhaW4="}
        assert b"Idempotency-Key: k\r\n" in server.requests[0]
