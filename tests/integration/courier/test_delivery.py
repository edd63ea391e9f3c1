"""One attempt at a webhook: real TLS receivers that take it, fail, hang, redirect, drip, or are somebody else."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from keybroker.courier.delivery import UndeliveredError, context_for, deliver
from keybroker.errors import ConfigError
from tests.authorities import Shape
from tests.integration.client.servers import Connection, Place, Server, every, now, stays_silent

FIELDS = (("Content-Digest", "sha-256=:AA==:"), ("Signature", "notice=:AA==:"))
CONTENT = b'{"event":"requested"}'


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def receiver(place: Place, name: str = "localhost") -> ssl.SSLContext:
    """TLS of a receiver with a DNS name, as the web has it; it asks for no client certificate."""
    hour = 3_600

    issued = place.authority.issue(
        Shape(
            uris=(),
            extended=(ExtendedKeyUsageOID.SERVER_AUTH,),
            not_before=now() - datetime.timedelta(seconds=hour),
            not_after=now() + datetime.timedelta(seconds=hour),
            extra=((x509.SubjectAlternativeName([x509.DNSName(name)]), False),),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.write(place.directory / "receiver.pem"))
    return context


def attempt(server: Server, place: Place, timeout_s: float = 10) -> None:
    asyncio.run(deliver(f"https://localhost:{server.port}/hook?team=a", FIELDS, CONTENT, context_for(place.bundle), timeout_s))


def says(status: str, *headers: str) -> Callable[[Connection], None]:
    return every(lambda connection, _request: connection.answer(b"hello", status, *headers))


@pytest.mark.parametrize("status", ["200 OK", "202 Accepted", "204 No Content"])
def test_notice_is_posted_as_it_was_signed_and_2xx_is_a_delivery(place: Place, status: str) -> None:
    with Server(receiver(place), says(status)) as server:
        attempt(server, place)
        (request,) = server.requests
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /hook?team=a HTTP/1.1"
    assert f"Host: localhost:{server.port}" in lines
    assert "Content-Type: application/json" in lines
    assert {"Content-Digest: sha-256=:AA==:", "Signature: notice=:AA==:"} <= set(lines)
    assert body == CONTENT


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "410 Gone", "429 Too Many Requests", "500 Oops", "503 Later"])
def test_other_statuses_are_failures(place: Place, status: str) -> None:
    with Server(receiver(place), says(status)) as server:
        with pytest.raises(UndeliveredError, match=f"status {status[:3]}"):
            attempt(server, place)
        assert len(server.requests) == 1  # no second attempt by itself


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirect_is_a_failure_and_is_not_followed(place: Place, status: str) -> None:
    context = receiver(place)
    with Server(context, says("200 OK")) as other, Server(context, says(status, f"Location: https://localhost:{other.port}/")) as server:
        with pytest.raises(UndeliveredError, match=f"status {status[:3]}"):
            attempt(server, place)
        assert other.accepted == 0


def drips(connection: Connection) -> None:
    connection.read_request()
    while not connection.server.stop.wait(0.02):
        connection.send(b"H")


@pytest.mark.parametrize("behave", [stays_silent, drips], ids=["silent", "drips"])
def test_receiver_that_hangs_is_given_up_in_time(place: Place, behave: Callable[[Connection], None]) -> None:
    started = time.monotonic()
    with Server(receiver(place), behave) as server, pytest.raises(UndeliveredError, match=r"no answer in 0\.5 s|no HTTP"):
        attempt(server, place, timeout_s=0.5)
    assert time.monotonic() - started < 9


def test_handshake_that_hangs_is_given_up_in_time(place: Place) -> None:
    with Server(None, stays_silent) as server, pytest.raises(UndeliveredError, match=r"no answer in 0\.5 s"):
        attempt(server, place, timeout_s=0.5)


def test_interim_answers_are_passed_over(place: Place) -> None:
    def answers(connection: Connection, _request: bytes) -> None:
        connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with Server(receiver(place), every(answers)) as server:
        attempt(server, place)


@pytest.mark.parametrize("garbage", [b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000, b"\0" * 100_000])
def test_answer_that_is_not_http_is_a_failure(place: Place, garbage: bytes) -> None:
    behave = every(lambda connection, _request: connection.send(garbage))
    with Server(receiver(place), behave) as server, pytest.raises(UndeliveredError, match="not HTTP"):
        attempt(server, place)


def test_receiver_that_ends_the_connection_has_not_taken_it(place: Place) -> None:
    def resets(connection: Connection) -> None:
        connection.read_request()
        connection.reset()

    with Server(receiver(place), resets) as server, pytest.raises(UndeliveredError):
        attempt(server, place)


def test_endless_answer_is_not_read(place: Place) -> None:
    def floods(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(10_000):
            connection.send(bytes(65_536))

    started = time.monotonic()
    with Server(receiver(place), floods) as server:
        attempt(server, place)
    assert time.monotonic() - started < 9


def test_receiver_with_another_name_gets_nothing(place: Place) -> None:
    with Server(receiver(place, "elsewhere.example"), says("200 OK")) as server:
        with pytest.raises(UndeliveredError, match=r"certificate is refused: Hostname mismatch"):
            attempt(server, place)
        assert server.requests == []


def test_receiver_of_another_authority_gets_nothing(place: Place, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Place(tmp_path / "other")
    with Server(receiver(other), says("200 OK")) as server:
        with pytest.raises(UndeliveredError, match="certificate is refused"):
            attempt(server, place)
        assert server.requests == []


def test_proxies_of_the_environment_are_not_asked(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(None, stays_silent) as proxy:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        with Server(receiver(place), says("200 OK")) as server:
            attempt(server, place)
        assert proxy.accepted == 0


def test_nobody_there_is_a_failure_in_words(place: Place) -> None:
    with Server(receiver(place), says("200 OK")) as server:
        pass
    with pytest.raises(UndeliveredError, match="no connection"):
        attempt(server, place)


def test_authorities_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for name in ("ca.pem", "none.pem"):
        with pytest.raises(ConfigError, match="cannot be used as CA certificates"):
            context_for(tmp_path / name)
