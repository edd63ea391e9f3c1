"""How things end: clients that go away at each point, and an authority that is absent, slow, or answers another question."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from keybroker.errors import AuditUnavailableError, HsmTimeoutError
from keybroker.frontend.authority_link import ASK_SECONDS
from keybroker.model.call import Answer, BatchReply, Call, HealthReply, KeyReply, KeysReply, Problem, PublicVersion, RecordsReply
from tests.integration.frontend.fake_authority import SIGNED
from tests.integration.frontend.served import Answered, Conversation, Served, request, sign
from tests.worlds import until

BODY = b'{"algorithm":"ES256","message":"aGk="}'
LONG = b'{"algorithm":"ES256","message":"' + b"A" * 200_000 + b'"}'


@pytest.fixture
def impatient(served: Served) -> Iterator[Served]:
    """Waits half a second for the authority."""
    served.asking.patience_s = 0.5
    yield served
    served.asking.patience_s = ASK_SECONDS


def only(answers: list[Answered]) -> Answered:
    (answer,) = answers
    return answer


def assert_outage(answer: Answered, code: str = "overloaded", retry_after: str = "1") -> None:
    document = json.loads(answer.body)
    assert (answer.status, document["type"]) == (503, f"urn:keybroker:problem:{code}")
    assert answer.headers["retry-after"] == retry_after
    assert document["instance"].startswith("urn:keybroker:request:0")


PHASES: dict[str, bytes] = {
    "nothing sent": b"",
    "in the first line": b"GET /v1/who",
    "in the head": b"GET /v1/whoami HTTP/1.1\r\nHost: bro",
    "at the end of the head": sign(LONG).partition(b"{")[0],
    "in the body": sign(LONG)[:150_000],
    "in a chunk": request("/v1/keys/orders/sign", "Transfer-Encoding: chunked", method="POST") + b"20000\r\n" + b"x" * 70_000,
    "before the answer": sign(LONG),
}


def leave_quietly(conversation: Conversation) -> None:
    conversation.sock.close()


def leave_with_reset(conversation: Conversation) -> None:
    conversation.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    conversation.sock.close()


@pytest.mark.parametrize("leave", [leave_quietly, leave_with_reset])
@pytest.mark.parametrize("phase", PHASES)
def test_disconnect_leaves_no_connection_counted_and_no_budget_borrowed(
    impatient: Served, phase: str, leave: Callable[[Conversation], None]
) -> None:
    before = impatient.budget.left
    impatient.authority.answers = lambda _call: None
    with impatient.connected() as conversation:
        conversation.send(PHASES[phase])
        until(lambda: impatient.listener.open_connections == 1)
        if phase in {"in the body", "in a chunk", "before the answer"}:
            until(lambda: impatient.budget.left < before)
        leave(conversation)
        until(lambda: impatient.listener.open_connections == 0)
    until(lambda: impatient.budget.left == before)
    until(lambda: not impatient.shared.connections)
    until(lambda: impatient.link.in_flight == 0)
    assert impatient.counter("keybroker_connections") == 0
    impatient.authority.answers = impatient.authority.allow
    assert only(impatient.ask(request(close=True))).status == 200


def test_tcp_connection_without_tls_is_counted_out_when_it_goes(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 10):
        until(lambda: served.listener.open_connections == 1)
    until(lambda: served.listener.open_connections == 0)


def test_half_closed_connection_is_ended(served: Served) -> None:
    with served.connected() as conversation:
        conversation.send(request()[:-2])
        conversation.sock.shutdown(socket.SHUT_WR)
        until(lambda: served.listener.open_connections == 0)


@pytest.mark.parametrize("data", [request(), sign(BODY)])
def test_absent_authority_is_503_and_the_connection_stays(served: Served, data: bytes) -> None:
    with served.connected() as conversation:
        assert conversation.exchange(data).status == 200
        served.on_loop(served.authority.stop())
        until(lambda: not served.link.is_up)
        assert_outage(conversation.exchange(data))
        served.on_loop(served.authority.start())
        until(lambda: served.link.is_up)
        assert conversation.exchange(data).status == 200


def test_authority_that_goes_away_before_it_answers_is_503(served: Served) -> None:
    served.authority.answers = lambda _call: None
    with served.connected() as conversation:
        conversation.send(sign(BODY))
        until(lambda: len(served.authority.calls) == 1)
        served.on_loop(served.authority.stop())
        served.on_loop(served.authority.start())
        assert_outage(conversation.one())
    until(lambda: served.link.is_up)


def test_slow_authority_is_503_after_its_time_and_its_late_answer_goes_to_nobody(impatient: Served) -> None:
    kept: list[Call] = []

    def keep(call: Call) -> None:
        kept.append(call)

    impatient.authority.answers = keep
    with impatient.connected() as conversation:
        assert_outage(conversation.exchange(sign(BODY)))
        impatient.authority.answers = impatient.authority.allow
        (channel,) = impatient.authority._channels
        assert conversation.exchange(request()).status == 200

        async def answer_late() -> None:
            channel.send(Answer(kept[0].id, SIGNED))

        impatient.on_loop(answer_late())
        answer = conversation.exchange(request())
        assert (answer.status, b"spiffe_id" in answer.body) == (200, True)
    assert [event["event"] for event in impatient.events] == ["no answer from the authority"]


@pytest.mark.parametrize("reply", [KeysReply(()), RecordsReply((b"{}",), ""), HealthReply(True, {})])  # noqa: FBT003  a row of the frame
def test_answer_to_another_question_is_503_and_nothing_of_it_is_shown(
    served: Served, reply: KeysReply | RecordsReply | HealthReply
) -> None:
    served.authority.answers = lambda _call: reply
    assert_outage(only(served.ask(sign(BODY, close=True))))
    (event,) = served.events
    assert (event["event"], event["got"], event["expected"]) == (
        "the authority answered another question",
        type(reply).__name__,
        "UseReply",
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batch_with_another_number_of_answers_is_503(served: Served, count: int) -> None:
    served.authority.answers = lambda _call: BatchReply((SIGNED,) * count)
    body = b'{"items":[%s,%s]}' % (BODY, BODY)
    answer = only(served.ask(sign(body, target="/v1/keys/orders/sign/batch", close=True)))
    assert_outage(answer)
    assert b"c2lnbmF0dXJl" not in answer.body


def test_fault_of_ours_is_503_as_a_problem_and_logged_once(served: Served) -> None:
    version = PublicVersion(1, "rsa", "enabled", b"no key at all", "")
    served.authority.answers = lambda _call: KeyReply("orders", {}, ("PS256",), (version,))
    with served.connected() as conversation:
        answer = conversation.exchange(request("/v1/keys/orders/public"))
        assert_outage(answer)
        assert answer.headers["content-type"] == "application/problem+json"
        assert conversation.exchange(request("/v1/keys/orders")).status == 200  # the connection is as good as before
    (event,) = served.events
    assert (event["event"], event["request_id"]) == ("request failed", served.authority.calls[0].request_id)
    assert served.counter('keybroker_requests_total{route="/v1/keys/{key}/public",status="503"}') == 1
    served.events.clear()


def test_unknown_code_of_the_authority_is_an_outage(served: Served) -> None:
    served.authority.answers = lambda _call: Problem("signed", "Trust me.")
    assert_outage(only(served.ask(sign(BODY, close=True))))


def test_refusal_of_the_authority_keeps_its_time_and_its_use(served: Served) -> None:
    served.authority.answers = lambda _call: Problem.of(AuditUnavailableError("Full.", retry_after=7, use="01J"))
    answer = only(served.ask(sign(BODY, close=True)))
    assert_outage(answer, "audit-unavailable", "7")
    assert json.loads(answer.body)["use"] == "01J"


def test_token_that_did_not_answer_is_504(served: Served) -> None:
    served.authority.answers = lambda _call: Problem.of(HsmTimeoutError("Late.", use="01J"))
    answer = only(served.ask(sign(BODY, close=True)))
    assert (answer.status, json.loads(answer.body)["use"]) == (504, "01J")


def test_connection_that_drains_gets_its_answer_and_the_end(served: Served) -> None:
    served.authority.answers = lambda _call: None
    with served.connected() as conversation, served.connected() as quiet:
        conversation.send(sign(BODY))
        until(lambda: len(served.authority.calls) == 1)

        async def drain() -> None:
            for connection in list(served.shared.connections):
                connection.shutdown()

        served.on_loop(drain())
        assert not quiet.rest()
        served.on_loop(served.authority.stop())
        served.on_loop(served.authority.start())
        answer = only(conversation.rest())
        assert (answer.status, answer.headers["connection"]) == (503, "close")
    until(lambda: served.link.is_up)
