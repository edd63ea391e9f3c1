"""Bytes that two readers could take for two different requests: one 400, nothing asked, and the door (RFC 9112 section 11.2)."""

from __future__ import annotations

import json

import pytest

from tests.integration.frontend.served import WORKLOAD, Answered, Served, request, sign
from tests.worlds import until

GET = b"GET /v1/whoami HTTP/1.1\r\n"
HOST = b"Host: broker\r\n"
POST = b"POST /v1/keys/orders/sign HTTP/1.1\r\nHost: broker\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = request("/v1/keys", close=True)  # what a smuggler wants answered
BODY = b'{"algorithm":"ES256","message":"aGk="}'

REFUSED = {
    "length, then chunked": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "length twice": POST + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "length with plus": POST + b"Content-Length: +5\r\n\r\nhello",
    "length with minus": POST + b"Content-Length: -5\r\n\r\nhello",
    "length with space in it": POST + b"Content-Length: 5 5\r\n\r\nhello",
    "length with underscore": POST + b"Content-Length: 0_5\r\n\r\nhello",
    "length in hex": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "length in other digits": POST + b"Content-Length: \xd9\xa5\r\n\r\nhello",
    "empty length": POST + b"Content-Length: \r\n\r\nhello",
    "length of 2^64": POST + b"Content-Length: 18446744073709551616\r\n\r\nhello",
    "space before colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "bare LF": b"GET /v1/whoami HTTP/1.1\nHost: broker\n\n",
    "bare LF after a field": GET + b"Host: broker\nX: y\r\n\r\n",
    "bare LF at the end": GET + HOST + b"\n",
    "bare CR": GET + b"Host: broker\rX: y\r\n\r\n",
    "folded field": GET + HOST + b"X: y\r\n z\r\n\r\n",
    "folded first field": GET + b" Host: broker\r\n\r\n",
    "two hosts": GET + HOST + HOST + b"\r\n",
    "no host": GET + b"X: y\r\n\r\n",
    "empty host": GET + b"Host: \r\n\r\n",
    "host with a space": GET + b"Host: a b\r\n\r\n",
    "host with a user": GET + b"Host: a@b\r\n\r\n",
    "host with a path": GET + b"Host: a/b\r\n\r\n",
    "host not ASCII": GET + "Host: ö\r\n\r\n".encode(),
    "HTTP/0.9": b"GET /v1/whoami\r\n\r\n",
    "HTTP/0.9, one line": b"GET /v1/whoami\r\n",
    "HTTP/1.0": b"GET /v1/whoami HTTP/1.0\r\nHost: broker\r\n\r\n",
    "RTSP": b"GET /v1/whoami RTSP/1.1\r\nHost: broker\r\n\r\n",
    "ICE": b"SOURCE /v1/whoami ICE/1.1\r\nHost: broker\r\n\r\n",
    "RTSP, a method of its own": b"DESCRIBE /v1/whoami RTSP/1.1\r\nHost: broker\r\n\r\n",
    "HTTP/1.2": b"GET /v1/whoami HTTP/1.2\r\nHost: broker\r\n\r\n",
    "HTTP/2 in words": b"GET /v1/whoami HTTP/2.0\r\nHost: broker\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "lower-case protocol": b"GET /v1/whoami http/1.1\r\nHost: broker\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked, chunked": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked, then identity": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "chunked, space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "chunked after a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunked, tab after it": POST + b"Transfer-Encoding: chunked \t\r\n\r\n0\r\n\r\n",
    "trailer field": CHUNKED + b"0\r\nX: y\r\n\r\n",
    "chunk size with minus": CHUNKED + b"-1\r\n\r\n",
    "chunk size with plus": CHUNKED + b"+5\r\nhello\r\n0\r\n\r\n",
    "chunk size with 0x": CHUNKED + b"0x5\r\nhello\r\n0\r\n\r\n",
    "chunk size with space": CHUNKED + b"5 \r\nhello\r\n0\r\n\r\n",
    "chunk size with bare LF": CHUNKED + b"5\nhello\r\n0\r\n\r\n",
    "chunk size over 64 bits": CHUNKED + b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "chunk extension with bare LF": CHUNKED + b"5;a\nhello\r\n0\r\n\r\n",
    "chunk without its end": CHUNKED + b"5\r\nhello0\r\n\r\n",
    "chunk longer than it says": CHUNKED + b"3\r\nhello\r\n0\r\n\r\n",
    "NUL in a value": GET + HOST + b"X: a\x00b\r\n\r\n",
    "NUL in a name": GET + HOST + b"X\x00: a\r\n\r\n",
    "NUL in the target": b"GET /v1/who\x00ami HTTP/1.1\r\nHost: broker\r\n\r\n",
    "space in the target": b"GET /v1/ whoami HTTP/1.1\r\nHost: broker\r\n\r\n",
    "UTF-8 in the target": "GET /v1/keys/ö HTTP/1.1\r\nHost: broker\r\n\r\n".encode(),
    "Latin-1 in the target": "GET /v1/keys/ö HTTP/1.1\r\nHost: broker\r\n\r\n".encode("latin-1"),
    "fragment in the target": b"GET /v1/keys/orders#/../release HTTP/1.1\r\nHost: broker\r\n\r\n",
    "empty field name": GET + HOST + b": a\r\n\r\n",
    "field without colon": GET + HOST + b"foo\r\n\r\n",
    "tab after the method": b"GET\t/v1/whoami HTTP/1.1\r\nHost: broker\r\n\r\n",
    "unknown method": b"FOO /v1/whoami HTTP/1.1\r\nHost: broker\r\n\r\n",
    "lower-case method": b"get /v1/whoami HTTP/1.1\r\nHost: broker\r\n\r\n",
    "upgrade": GET + HOST + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    "CONNECT": b"CONNECT broker:443 HTTP/1.1\r\nHost: broker\r\n\r\n",
    "no HTTP at all": b"\x00\x01\x02\x03 hello\r\n\r\n",
}


def only(answers: list[Answered]) -> Answered:
    (answer,) = answers
    return answer


@pytest.mark.case(16)
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_request_gets_one_400_and_the_end(served: Served, name: str) -> None:
    answer = only(served.ask(REFUSED[name] + NEXT))
    assert answer.status == 400
    assert answer.headers["connection"] == "close"
    assert answer.headers["content-type"] == "application/problem+json"
    document = json.loads(answer.body)
    assert document["type"] == "urn:keybroker:problem:malformed"
    assert document["instance"].startswith("urn:keybroker:request:0")
    assert not served.authority.calls


@pytest.mark.case(16)
@pytest.mark.parametrize("name", ["length twice", "folded field", "two hosts", "trailer field", "chunk without its end"])
def test_ambiguous_request_gets_one_400_byte_by_byte(served: Served, name: str) -> None:
    with served.connected() as conversation:
        for byte in REFUSED[name]:
            conversation.send(bytes([byte]))
        assert only(conversation.rest()).status == 400
    assert not served.authority.calls


@pytest.mark.case(16)
@pytest.mark.parametrize("name", REFUSED)
def test_ambiguous_request_gets_one_400_after_a_good_one(served: Served, name: str) -> None:
    with served.connected() as conversation:
        assert conversation.exchange(request()).status == 200
        conversation.send(REFUSED[name] + NEXT)
        assert only(conversation.rest()).status == 400
    assert len(served.authority.calls) == 1


PLAIN = {
    "plain": GET + HOST + b"Connection: close\r\n\r\n",
    "empty lines first": b"\r\n\r\n" + GET + HOST + b"Connection: close\r\n\r\n",
    "absolute-form": b"GET https://elsewhere.example/v1/whoami HTTP/1.1\r\nHost: broker\r\nConnection: close\r\n\r\n",
    "IPv6 host with a port": GET + b"Host: [::1]:8443\r\nConnection: close\r\n\r\n",
    "spaces around a value": GET + b"Host: \t broker \t\r\nConnection:close\r\n\r\n",
}


@pytest.mark.case(16)
@pytest.mark.parametrize("name", PLAIN)
def test_request_in_a_form_that_http_knows_is_answered(served: Served, name: str) -> None:
    answer = only(served.ask(PLAIN[name]))
    assert (answer.status, json.loads(answer.body)["spiffe_id"]) == (200, WORKLOAD)
    assert len(served.authority.calls) == 1


@pytest.mark.case(16)
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length:   %d  \r\nConnection: close\r\n\r\n%s" % (len(BODY), BODY),
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
        b"transfer-encoding:\tCHUNKED\r\nConnection: close\r\n\r\n%X;ext=1\r\n%s\r\n000\r\n\r\n" % (len(BODY), BODY),
        b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n1\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (BODY[:1], len(BODY) - 1, BODY[1:]),
    ],
)
def test_body_in_a_framing_that_http_knows_is_read(served: Served, framing: bytes) -> None:
    assert only(served.ask(POST + framing)).status == 200
    assert len(served.authority.calls) == 1


@pytest.mark.case(16)
def test_request_that_is_sent_before_the_first_is_answered_is_not_answered(served: Served) -> None:
    answer = only(served.ask(request() + NEXT))
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert len(served.authority.calls) == 1


@pytest.mark.case(16)
def test_request_that_is_sent_while_the_first_is_under_way_is_not_answered(served: Served) -> None:
    served.authority.answers = lambda _call: None
    with served.connected() as conversation:
        conversation.send(sign(BODY))
        until(lambda: len(served.authority.calls) == 1)
        conversation.send(NEXT)
        served.on_loop(served.authority.stop())  # the first one fails now
        served.on_loop(served.authority.start())
        answer = only(conversation.rest())
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert len(served.authority.calls) == 1
    until(lambda: served.link.is_up)


@pytest.mark.case(16)
def test_garbage_after_the_last_request_is_not_answered(served: Served) -> None:
    assert only(served.ask(request(close=True) + b"GARBAGE\r\n\r\n")).status == 200
