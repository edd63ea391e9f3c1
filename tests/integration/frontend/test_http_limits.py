"""How much one request may be: bodies, header fields, targets. Over the limit the server answers, stops reading, and keeps nothing."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path

import pytest

from keybroker.frontend.bodies import MAX_SIGN_BODY_BYTES
from keybroker.frontend.limits import ByteBudget
from keybroker.model.request import MAX_BATCH_BYTES, MAX_MESSAGE_BYTES
from tests.integration.frontend.served import Answered, Conversation, Served, request, sign
from tests.worlds import until

SIGN = "/v1/keys/orders/sign"
BATCH = "/v1/keys/orders/sign/batch"
FIELDS = ("Content-Type: application/json",)
CHUNKED = (*FIELDS, "Transfer-Encoding: chunked")


def only(answers: list[Answered]) -> Answered:
    (answer,) = answers
    return answer


def code(answer: Answered) -> str:
    return str(json.loads(answer.body)["type"]).removeprefix("urn:keybroker:problem:")


def declared(target: str, size: int) -> bytes:
    return request(target, *FIELDS, f"Content-Length: {size}", method="POST")


def pour(conversation: Conversation, total: int, piece: bytes = b"x" * 65_536) -> int:
    """Send chunks until the server ends the connection; how many bytes it took."""
    sent = 0
    try:
        while sent < total:
            conversation.sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
    except OSError:
        pass
    return sent


def resident_kib() -> int:
    return next(int(line.split()[1]) for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines() if line.startswith("VmRSS"))


@pytest.mark.case(13)
@pytest.mark.parametrize(
    ("target", "limit"), [(SIGN, MAX_SIGN_BODY_BYTES), (f"{SIGN}/explain", MAX_SIGN_BODY_BYTES), (BATCH, MAX_BATCH_BYTES)]
)
@pytest.mark.parametrize("over", [1, 1_000_000_000_000])
def test_declared_body_gets_413_unread_if_over_the_limit(served: Served, target: str, limit: int, over: int) -> None:
    answer = only(served.ask(declared(target, limit + over)))
    assert (answer.status, code(answer), answer.headers["connection"]) == (413, "too-large", "close")
    assert not served.authority.calls


@pytest.mark.case(13)
def test_declared_body_gets_its_413_where_the_client_sends_it_all_the_same(served: Served) -> None:
    answer = only(served.ask(declared(SIGN, MAX_SIGN_BODY_BYTES + 1) + b"x" * (MAX_SIGN_BODY_BYTES + 1)))
    assert answer.status == 413


@pytest.mark.case(13)
def test_query_does_not_widen_the_limit(served: Served) -> None:
    answer = only(served.ask(declared(f"{SIGN}?of=/sign/batch", MAX_SIGN_BODY_BYTES + 1)))
    assert answer.status == 413


@pytest.mark.case(13)
def test_largest_message_is_signed(served: Served) -> None:
    body = json.dumps({"algorithm": "ES256", "message": base64.b64encode(bytes(MAX_MESSAGE_BYTES)).decode()}).encode()
    answer = only(served.ask(sign(body, close=True)))
    assert answer.status == 200


@pytest.mark.case(13)
def test_message_of_one_byte_more_is_refused(served: Served) -> None:
    body = json.dumps({"algorithm": "ES256", "message": base64.b64encode(bytes(MAX_MESSAGE_BYTES + 1)).decode()}).encode()
    answer = only(served.ask(sign(body, close=True)))
    assert (answer.status, code(answer)) == (422, "invalid")
    assert not served.authority.calls


@pytest.mark.case(13)
@pytest.mark.parametrize(("target", "limit"), [(SIGN, MAX_SIGN_BODY_BYTES), (BATCH, MAX_BATCH_BYTES)])
def test_chunked_body_gets_413_and_is_read_no_further(served: Served, target: str, limit: int) -> None:
    before = resident_kib()
    total = 64 * 1024 * 1024
    with served.connected() as conversation:
        conversation.send(request(target, *CHUNKED, method="POST"))
        sent = pour(conversation, total)
        answer = only(conversation.rest())
    assert answer.status == 413
    assert sent < 16 * 1024 * 1024  # what is on its way, in buffers of the kernel and of TLS
    assert (resident_kib() - before) * 1024 < 2 * limit + 8 * 1024 * 1024  # this process is the client too
    assert not served.authority.calls


@pytest.mark.case(13)
def test_sender_of_too_large_a_body_is_shut_out_after_a_moment(served: Served) -> None:
    with served.connected() as conversation:
        conversation.send(declared(SIGN, MAX_SIGN_BODY_BYTES + 1))
        answer = only(conversation.rest())  # returns at the end of the connection only
    assert answer.status == 413
    until(lambda: served.listener.open_connections == 0)


@pytest.mark.case(13)
def test_upload_beyond_the_budget_of_all_gets_503_and_the_budget_comes_back(tmp_path: Path) -> None:
    body = b'{"algorithm":"ES256","message":"' + base64.b64encode(bytes(90_000)) + b'"}'
    with Served(tmp_path, budget=ByteBudget(450_000)) as small:  # three bytes for each of a body
        with small.connected() as first:
            first.send(sign(body)[:-1])
            until(lambda: small.budget.left < 450_000 - 3 * 119_000)
            answer = only(small.ask(sign(body)))
            assert (answer.status, code(answer), answer.headers["retry-after"]) == (503, "overloaded", "1")
            assert not small.authority.calls
            first.send(sign(body)[-1:])
            assert first.one().status == 200  # the first one is none the worse for it
        until(lambda: small.budget.left == 450_000)
        assert only(small.ask(sign(body, close=True))).status == 200


@pytest.mark.case(17)
@pytest.mark.parametrize("close", [True, False])
def test_target_gets_414_over_8_kib_and_not_below(served: Served, close: bool) -> None:  # the rest of the request, or none
    path = "/v1/keys/"
    fits = only(served.ask(request(path + "a" * (8192 - len(path)), close=True)))
    assert fits.status == 404
    data = request(path + "a" * (8193 - len(path)), close=True)
    answer = only(served.ask(data if close else data[:9_000]))
    assert (answer.status, code(answer), answer.headers["connection"]) == (414, "uri-too-long", "close")


@pytest.mark.case(17)
def test_target_without_end_gets_414(served: Served) -> None:
    assert only(served.ask(b"GET /" + b"a" * 200_000)).status == 414


@pytest.mark.case(17)
def test_header_fields_get_431_over_100_and_not_below(served: Served) -> None:
    fields = [f"X-{number}: y" for number in range(98)]  # Host and Connection are two more
    assert only(served.ask(request("/v1/whoami", *fields, close=True))).status == 200
    answer = only(served.ask(request("/v1/whoami", *fields, "One: more", close=True)))
    assert (answer.status, code(answer), answer.headers["connection"]) == (431, "headers-too-large", "close")


@pytest.mark.case(17)
def test_header_fields_get_431_over_16_kib_and_not_below(served: Served) -> None:
    others = sum(len(name) + len(value) + 4 for name, value in (("Host", "broker"), ("Connection", "close"), ("X", "")))
    fits = 16 * 1024 - others
    assert only(served.ask(request("/v1/whoami", "X: " + "y" * fits, close=True))).status == 200
    answer = only(served.ask(request("/v1/whoami", "X: " + "y" * (fits + 1), close=True)))
    assert (answer.status, code(answer)) == (431, "headers-too-large")


@pytest.mark.case(17)
@pytest.mark.parametrize("start", [b"X: ", b"X" * 20_000, b"Host: b\r\nX:"])
def test_header_field_without_end_gets_431(served: Served, start: bytes) -> None:
    with served.connected() as conversation:
        conversation.send(b"GET /v1/whoami HTTP/1.1\r\n" + start)
        for _ in range(100):
            conversation.send(b"y" * 1_024)
        assert only(conversation.rest()).status == 431
    assert not served.authority.calls


def test_client_that_waits_for_100_is_told_to_go_on(served: Served) -> None:
    body = b'{"algorithm":"ES256","message":"aGk="}'
    head, blank, _ = sign(body, "Expect: 100-continue").partition(b"\r\n\r\n")
    with served.connected() as conversation:
        assert conversation.exchange(head + blank).status == 100
        assert not served.authority.calls
        assert conversation.exchange(body).status == 200


def test_client_that_waits_for_100_is_refused_before_it_sends_too_much(served: Served) -> None:
    answer = only(served.ask(request(SIGN, *FIELDS, "Expect: 100-continue", f"Content-Length: {MAX_SIGN_BODY_BYTES + 1}", method="POST")))
    assert answer.status == 413


@pytest.mark.case(17)
@pytest.mark.parametrize("size", [1, 100, 1_000, 8_000, 15_000])
def test_head_within_the_limits_is_taken_however_it_is_cut(served: Served, size: int) -> None:
    """A head is counted once: not again because it came in pieces."""
    target = "/v1/keys/" + "a" * 8_000
    fields = [f"X-{number}: {'y' * (150 if size == 1 else 1_000)}" for number in range(15)]
    data = request(target, *fields, close=True)
    with served.connected() as conversation:
        for start in range(0, len(data), size):
            conversation.send(data[start : start + size])
        assert only(conversation.rest()).status == 404
