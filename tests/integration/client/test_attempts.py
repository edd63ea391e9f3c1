"""How long a call takes, how often it is tried, and what it shares with others. Both clients, real TLS; requests are counted there."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from keybroker.client import AUTO, BrokerUnreachableError, Client, SignBody
from keybroker.errors import OverloadedError
from keybroker.model.key import Algorithm
from tests.integration.client.servers import (
    SIGNED,
    WHOAMI,
    Behaviour,
    Connection,
    Kind,
    Place,
    Server,
    asking,
    every,
    facing,
    stays_silent,
    whoami,
)
from tests.worlds import until

SHORT_S = 1.0


def test_nobody_listens(kind: Kind, place: Place) -> None:
    with Server(None, every(whoami)) as gone:
        pass
    with asking(kind, gone, place) as broker, pytest.raises(BrokerUnreachableError, match="onnect") as caught:
        broker.whoami()
    assert not caught.value.was_sent


def reads_and_stays_silent(connection: Connection) -> None:
    connection.read_request()
    connection.server.stop.wait()


def drips(data: bytes) -> Behaviour:
    """A byte every little while, for ever: no single read ever times out."""

    def behave(connection: Connection) -> None:
        connection.read_request()
        connection.send(data)
        while not connection.server.stop.wait(0.05):
            connection.send(b"x")

    return behave


SLOW = {
    "says nothing": reads_and_stays_silent,
    "drips its head": drips(b"HTTP/1.1 200 OK\r\nX-Slow: "),
    "drips its body": drips(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
    "drips chunks": drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n"),
}


@pytest.mark.parametrize("how", SLOW)
def test_call_ends_in_time_however_slowly_the_answer_comes(kind: Kind, place: Place, how: str) -> None:
    with facing(kind, place, place.server_context(), SLOW[how], timeout_s=SHORT_S) as (server, broker):
        started = time.monotonic()
        with pytest.raises(BrokerUnreachableError, match=r"no complete answer in 1 s") as caught:
            broker.sign("orders", "ES256", message=b"x", idempotency_key=AUTO)
        assert SHORT_S <= time.monotonic() - started < SHORT_S + 8
        assert len(server.requests) == 1
    assert caught.value.was_sent


def test_call_ends_in_time_where_there_is_no_handshake(kind: Kind, place: Place) -> None:
    with facing(kind, place, None, stays_silent, timeout_s=SHORT_S) as (_, broker):
        started = time.monotonic()
        with pytest.raises(BrokerUnreachableError):
            broker.whoami()
        assert time.monotonic() - started < SHORT_S + 8


def test_call_ends_in_time_where_a_large_request_is_not_read(kind: Kind, place: Place) -> None:
    items = [SignBody(algorithm=Algorithm.ES256, message=bytes(256 * 1024))] * 40
    with facing(kind, place, place.server_context(), stays_silent, timeout_s=SHORT_S) as (_, broker):
        started = time.monotonic()
        with pytest.raises(BrokerUnreachableError):
            broker.sign_batch("orders", items)
        assert time.monotonic() - started < SHORT_S + 8


def test_half_an_answer_is_no_answer_and_a_read_is_tried_again(kind: Kind, place: Place) -> None:
    def breaks_off_once(connection: Connection) -> None:
        if connection.read_request() and connection.server.accepted == 1:
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
        else:
            connection.answer(WHOAMI)

    with facing(kind, place, place.server_context(), breaks_off_once) as (server, broker):
        assert broker.whoami()
        assert len(server.requests) == 2


@pytest.mark.parametrize("how", ["closes", "resets", "breaks off"])
def test_signature_is_not_asked_for_again_without_an_idempotency_key(kind: Kind, place: Place, how: str) -> None:
    def behave(connection: Connection) -> None:
        connection.read_request()
        if how == "resets":
            connection.reset()
        elif how == "breaks off":
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")

    with facing(kind, place, place.server_context(), behave) as (server, broker):
        for ask in (broker.sign, broker.explain):
            with pytest.raises(BrokerUnreachableError) as caught:
                ask("orders", "ES256", message=b"x")
            assert caught.value.was_sent
        with pytest.raises(BrokerUnreachableError):
            broker.sign_batch("orders", [])
        assert len(server.requests) == 3


@pytest.mark.case(20)
def test_signature_is_asked_for_again_with_the_same_idempotency_key(kind: Kind, place: Place) -> None:
    def loses_two(connection: Connection) -> None:
        while connection.read_request() and connection.server.accepted > 2:
            connection.answer(SIGNED)

    with facing(kind, place, place.server_context(), loses_two) as (server, broker):
        assert broker.sign("orders", "ES256", message=b"x", idempotency_key=AUTO).use == "01J"
        assert broker.sign("orders", "ES256", message=b"x", idempotency_key=AUTO).use == "01J"
        assert broker.sign("orders", "ES256", message=b"x", idempotency_key="mine").use == "01J"
    first, second, third, fourth, fifth = (idempotency_key_of(request) for request in server.requests)
    assert first == second == third
    assert len({first, fourth, fifth}) == 3
    assert fifth == b"mine"
    assert server.requests[0] == server.requests[1] == server.requests[2]


def idempotency_key_of(request: bytes) -> bytes:
    return request.partition(b"Idempotency-Key: ")[2].partition(b"\r\n")[0]


def busy(*headers: str, times: int = 1_000) -> Behaviour:
    """503 so many times, then answers."""

    def answer(connection: Connection, request: bytes) -> None:
        if len(connection.server.requests) <= times:
            connection.problem("overloaded", "503 Service Unavailable", *headers)
        else:
            whoami(connection, request)

    return every(answer)


def test_busy_broker_is_asked_again_after_as_long_as_it_says_where_that_is_safe(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context(), busy("Retry-After: 1", times=1)) as (server, broker):
        started = time.monotonic()
        assert broker.whoami()
        assert time.monotonic() - started >= 1
        assert len(server.requests) == 2
    with facing(kind, place, place.server_context(), busy("Retry-After: 1", times=1)) as (server, broker):
        assert broker.sign("orders", "ES256", message=b"x", idempotency_key=AUTO)
        assert len(server.requests) == 2


def test_busy_broker_is_not_asked_for_a_signature_again_without_an_idempotency_key(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context(), busy("Retry-After: 1")) as (server, broker):
        with pytest.raises(OverloadedError) as caught:
            broker.sign("orders", "ES256", message=b"x")
        assert caught.value.retry_after == 1
        assert len(server.requests) == 1


@pytest.mark.parametrize("header", ["Retry-After: 11", "Retry-After: 999999999", "Retry-After: 9999999999", "Retry-After: soon", "X-Y: z"])
def test_busy_broker_is_not_asked_again_where_there_is_no_time_or_no_hope(kind: Kind, place: Place, header: str) -> None:
    with facing(kind, place, place.server_context(), busy(header)) as (server, broker):
        started = time.monotonic()
        with pytest.raises(OverloadedError):
            broker.whoami()
        assert time.monotonic() - started < 5
        assert len(server.requests) == 1


def test_broker_that_never_answers_whole_is_asked_a_few_times_only(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context(), lambda connection: connection.reset()) as (server, broker):
        with pytest.raises(BrokerUnreachableError):
            broker.whoami()
        assert server.accepted == 5


@pytest.mark.parametrize("ending", ["closed", "reset"])
def test_connection_that_has_ended_in_between_costs_nothing(kind: Kind, place: Place, ending: str) -> None:
    def behave(connection: Connection) -> None:
        whoami(connection, connection.read_request())
        assert connection.server.cue.acquire(timeout=10)
        if ending == "reset":
            connection.reset()

    with facing(kind, place, place.server_context(), behave) as (server, broker):
        for number in (1, 2, 3):
            assert broker.sign("orders", "ES256", message=b"x")  # which could not be tried again
            server.cue.release()
            until(lambda number=number: server.ended == number)  # type: ignore[misc]
        assert len(server.requests) == 3


def test_many_calls_at_once_share_one_client_and_each_gets_its_own_answer(place: Place) -> None:
    def answer(connection: Connection, request: bytes) -> None:
        name = request.split(b" ")[1].rpartition(b"/")[2].decode()
        time.sleep(0.001)
        connection.answer({"name": name, "labels": {}, "algorithms": [], "versions": []})

    with Server(place.server_context(), every(answer)) as server:
        names = [f"key-{number}" for number in range(200)]
        with Client(server.url, svid=place.svid, bundle=place.bundle) as broker, ThreadPoolExecutor(20) as threads:
            assert [key.name for key in threads.map(broker.key, names)] == names
        assert server.accepted <= 20


def test_calls_that_are_under_way_end_well_when_the_svid_is_renewed(place: Place) -> None:
    held, go = threading.Event(), threading.Event()

    def answer(connection: Connection, request: bytes) -> None:
        if request.startswith(b"POST"):
            held.set()
            assert go.wait(10)
        whoami(connection, request)

    with (
        Server(place.server_context(), every(answer)) as server,
        Client(server.url, svid=place.svid, bundle=place.bundle) as broker,
        ThreadPoolExecutor(1) as threads,
    ):
        slow = threads.submit(broker.sign, "orders", "ES256", message=b"x")
        assert held.wait(10)
        place.svid.touch()
        assert broker.whoami()
        assert server.accepted == 2
        assert server.ended == 0
        go.set()
        assert slow.result(10).use == "01J"
        until(lambda: server.ended == 1)
        assert broker.whoami()
        assert server.accepted == 2


def test_closed_client_has_no_connection_and_says_so(kind: Kind, place: Place) -> None:
    with facing(kind, place, place.server_context()) as (server, broker):
        broker.whoami()
        assert server.ended == 0
        broker.close()
        until(lambda: server.ended == 1)
        with pytest.raises(RuntimeError, match="closed"):
            broker.whoami()
