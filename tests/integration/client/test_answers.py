"""What comes back: too much, from elsewhere, or in a form that no broker uses. Both clients, real TLS."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keybroker.client import AsyncClient, BrokerAnswerError, BrokerUnreachableError, Client, SettingsError, SignBody, transport
from keybroker.errors import ConfigError, DeniedError, InvalidError, NotFoundError, OverloadedError, RefusalError
from keybroker.model.key import Algorithm
from tests.integration.client.servers import (
    SIGNED,
    WHOAMI,
    Connection,
    Kind,
    Place,
    Server,
    every,
    facing,
    stays_silent,
    whoami,
)
from tests.worlds import until


@pytest.mark.parametrize("framing", ["Content-Length: 4000000", "Transfer-Encoding: chunked", "Connection: close"])
def test_huge_answer_is_dropped_as_soon_as_it_is_too_large(kind: Kind, place: Place, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_ANSWER_BYTES", 1_000_000)
    sent = []

    def floods(connection: Connection) -> None:
        connection.read_request()
        connection.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
        piece = (b"8000\r\n" if "chunked" in framing else b"") + bytes(32_768) + (b"\r\n" if "chunked" in framing else b"")
        for _ in range(3_000):
            connection.send(piece)
            sent.append(len(piece))

    with facing(kind, place, place.server_context(), floods) as (server, broker):
        with pytest.raises(BrokerAnswerError, match="more than 1000000 bytes"):
            broker.whoami()
        until(lambda: server.ended == 1)
    assert sum(sent) < 50_000_000


def test_endless_head_is_refused(kind: Kind, place: Place) -> None:
    def floods(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\n")
        for number in range(1_000_000):
            connection.send(b"X-%d: %s\r\n" % (number, bytes(1_000).replace(b"\0", b"x")))

    with facing(kind, place, place.server_context(), floods) as (_, broker), pytest.raises(BrokerUnreachableError):
        broker.sign("orders", "ES256", message=b"x")


@pytest.mark.parametrize("status", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirect_is_not_followed(kind: Kind, place: Place, status: str) -> None:
    with Server(place.server_context(), every(whoami)) as other:

        def redirects(connection: Connection, _: bytes) -> None:
            connection.answer(b"", status, f"Location: {other.url}/v1/whoami")

        with facing(kind, place, place.server_context(), every(redirects)) as (server, broker):
            for ask in (broker.whoami, lambda: broker.sign("orders", "ES256", message=b"x")):
                with pytest.raises(BrokerAnswerError, match=status[:3]):
                    ask()
            assert len(server.requests) == 2
    assert other.accepted == 0


def test_cookies_are_not_kept(kind: Kind, place: Place) -> None:
    def sets_one(connection: Connection, _: bytes) -> None:
        connection.answer(WHOAMI, "200 OK", "Set-Cookie: a=b")

    with facing(kind, place, place.server_context(), every(sets_one)) as (server, broker):
        broker.whoami()
        broker.whoami()
    assert b"ookie" not in server.received


def test_environment_changes_nothing(kind: Kind, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Server(None, stays_silent) as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"):
            monkeypatch.setenv(name, str(tmp_path / "nothing"))
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password secret\n")
        with facing(kind, place, place.server_context()) as (server, broker):
            assert broker.whoami()
        assert proxy.accepted == 0
    assert b"uthorization" not in server.received


PROBLEM = "application/problem+json"
GARBAGE = {
    "a page": (b"<html>502</html>", "text/html"),
    "an empty body": (b"", PROBLEM),
    "not JSON": (b"{", PROBLEM),
    "a list": (b"[]", PROBLEM),
    "no type": (b"{}", PROBLEM),
    "another's type": (b'{"type": "about:blank"}', PROBLEM),
    "a type that is a number": (b'{"type": 7}', PROBLEM),
    "reasons that are text": (b'{"type": "urn:keybroker:problem:denied", "reasons": "x"}', PROBLEM),
    "not UTF-8": (b'{"type": "urn:keybroker:problem:denied", "detail": "\xff"}', PROBLEM),
    "UTF-16": ('{"type": "urn:keybroker:problem:denied"}'.encode("utf-16"), PROBLEM),
    "too deep": (b'{"type": "urn:keybroker:problem:denied", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", PROBLEM),
    "a problem that is called JSON": (b'{"type": "urn:keybroker:problem:denied"}', "application/json"),
    "nothing said of its type": (b'{"type": "urn:keybroker:problem:denied"}', ""),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_for_a_problem_is_an_error_of_its_own_and_never_a_refusal(kind: Kind, place: Place, what: str) -> None:
    body, media_type = GARBAGE[what]

    def answer(connection: Connection, _: bytes) -> None:
        connection.answer(body, "403 Forbidden", media_type=media_type)

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker), pytest.raises(BrokerAnswerError):
        broker.whoami()


def test_problem_is_the_exception_of_its_code_with_all_that_it_says(kind: Kind, place: Place) -> None:
    document = {
        "type": "urn:keybroker:problem:denied", "title": "Denied", "status": 403, "detail": "A rule said no.",
        "instance": "urn:keybroker:request:01JREQ", "reasons": ["no-grant"], "errors": [{"pointer": "/a", "detail": "b"}],
        "use": "01JUSE", "of the future": {"more": 1},
    }  # fmt: skip

    def answer(connection: Connection, _: bytes) -> None:
        connection.answer(document, "403 Forbidden", media_type=f"{PROBLEM}; charset=utf-8")

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker), pytest.raises(DeniedError) as caught:
        broker.sign("orders", "ES256", message=b"x")
    err = caught.value
    assert (err.detail, err.reasons, err.pointers, err.request_id, err.use, err.retry_after) == (
        "A rule said no.", ("no-grant",), (("/a", "b"),), "01JREQ", "01JUSE", 0,
    )  # fmt: skip


def test_problem_of_an_unknown_code_is_an_outage(kind: Kind, place: Place) -> None:
    def answer(connection: Connection, _: bytes) -> None:
        connection.problem("of-the-future", "418 Teapot")

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker), pytest.raises(OverloadedError):
        broker.whoami()


@pytest.mark.parametrize("body", [b"", b"null", b"{}", b"[1]", b'{"spiffe_id": 7}', b"\xff", b"[" * 100_000])
def test_success_that_makes_no_sense_is_an_error(kind: Kind, place: Place, body: bytes) -> None:
    def answer(connection: Connection, _: bytes) -> None:
        connection.answer(body)

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker):
        for ask in (
            broker.whoami,
            broker.keys,
            lambda: broker.sign("orders", "ES256", message=b"x"),
            lambda: broker.sign_batch("orders", [SignBody(algorithm=Algorithm.ES256, message=b"x")]),
            broker.records,
            lambda: broker.record(7),
        ):
            with pytest.raises(BrokerAnswerError):
                ask()


def test_batch_answers_item_by_item_and_not_for_others(kind: Kind, place: Place) -> None:
    items = [SignBody(algorithm=Algorithm.ES256, message=b"x")] * 2
    problem = {"type": "urn:keybroker:problem:not-found", "detail": "No."}

    def answer(connection: Connection, request: bytes) -> None:
        count = len(json.loads(request.partition(b"\r\n\r\n")[2])["items"])
        connection.answer({"results": [SIGNED, problem] if count == 2 else [SIGNED]})

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker):
        signed, refused = broker.sign_batch("orders", items)
        assert signed.use == "01J"
        assert isinstance(refused, NotFoundError)
        with pytest.raises(BrokerAnswerError, match="1 answers to 3 items"):
            broker.sign_batch("orders", items + items[:1])


def test_request_that_cannot_be_right_is_not_sent(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context()) as (server, broker):
        for ask in (
            lambda: broker.key("../whoami"),
            lambda: broker.sign("orders?x=1", "ES256", message=b"x"),
            lambda: broker.sign("orders", "HS256", message=b"x"),
            lambda: broker.sign("orders", "ES256"),
            lambda: broker.sign("orders", "ES256", message=b"x", digest=bytes(32)),
            lambda: broker.sign("orders", "ES256", digest=bytes(31)),
            lambda: broker.sign("orders", "Ed25519", digest=bytes(64)),
            lambda: broker.sign("orders", "PS256", message=b"x", format="der"),
            lambda: broker.sign("orders", "ES256", message=bytes(256 * 1024 + 1)),
            lambda: broker.sign("orders", "ES256", message=b"x", idempotency_key="two words"),
            lambda: broker.sign("orders", "ES256", message=b"x", idempotency_key="x" * 65),
            lambda: broker.sign("orders", "ES256", message=b"x", idempotency_key="x\r\nX-Evil: 1"),
        ):
            with pytest.raises(InvalidError):
                ask()  # type: ignore[no-untyped-call]
        with pytest.raises(TypeError, match="mood"):
            broker.records(mood="bad")
        assert server.accepted == 0


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_client_is_not_made_of_settings_that_cannot_work(place: Place, client: type[Client | AsyncClient]) -> None:
    with pytest.raises(SettingsError):
        client("http://127.0.0.1:1", svid=place.svid, bundle=place.bundle)
    with pytest.raises(ConfigError, match=r"nowhere\.pem"):
        client("https://127.0.0.1:1", svid=place.directory / "nowhere.pem", bundle=place.bundle)
    with pytest.raises(ConfigError, match="bundle"):
        client("https://127.0.0.1:1", svid=place.svid, bundle=place.svid)


def test_every_refusal_is_one_of_the_tree(kind: Kind, place: Place) -> None:
    codes = iter(sorted(RefusalError.registry))

    def answer(connection: Connection, _: bytes) -> None:
        connection.problem(next(codes), "400 Bad Request")

    with facing(kind, place, place.server_context(), every(answer)) as (_, broker):
        for code in sorted(RefusalError.registry):
            with pytest.raises(RefusalError) as caught:
                broker.explain("orders", "ES256", message=b"x")
            assert caught.value.code == code
