"""What one client may take of what all have: connections of its SVID, memory for its answers, time to read them."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from keybroker.frontend.limits import ByteBudget, HttpLimits
from keybroker.frontend.signing import body_limit
from keybroker.model.call import Call, RecordsReply
from tests.integration.frontend.served import Conversation, Served, current, listening_to_logs, request
from tests.worlds import until

LARGE = b'{"text":"%s"}' % (b"x" * 3_000_000)
RECORDS = request("/v1/audit/records")


def large(_call: Call) -> RecordsReply:
    return RecordsReply((LARGE,), "")


@pytest.fixture(scope="module")
def roomless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Room for three connections of one SVID, and for one large answer."""
    limits = HttpLimits(body_bytes=body_limit, answer_s=0.5, answer_bytes_per_s=4_000_000, linger_s=0.1)
    budget = ByteBudget(5_000_000)
    with Served(tmp_path_factory.mktemp("tight"), limits=limits, max_per_svid=3, answers=budget) as served:
        served.authority.answers = large
        yield served
        assert budget.left == 5_000_000


@pytest.fixture
def tight(roomless: Served) -> Iterator[Served]:
    with listening_to_logs(roomless):
        yield roomless
        until(lambda: roomless.listener.open_connections == 0)
    assert not roomless.faults


def slow_reader(served: Served) -> Conversation:
    """A client whose system takes little that it does not read."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    plain.settimeout(20)
    plain.connect(("127.0.0.1", served.port))
    return Conversation(served.client_context(served.svid).wrap_socket(plain))


def records_of(answer_body: bytes) -> int:
    return len(json.loads(answer_body)["records"][0]["text"])


@pytest.mark.case(76)
def test_svid_with_too_many_connections_gets_503_and_others_are_served(tight: Served) -> None:
    ask = request("/v1/audit/records/1")
    other = tight.write_svid(tight.root.issue(current()))
    with tight.connected() as first, tight.connected() as second, tight.connected() as third:
        assert {each.exchange(ask).status for each in (first, second, third)} == {200}
        with tight.connected() as fourth:
            (answer,) = fourth.rest()
        assert (answer.status, answer.headers["connection"], answer.headers["retry-after"]) == (503, "close", "1")
        with tight.connected(other) as another:
            assert another.exchange(ask).status == 200
        assert first.exchange(ask).status == 200
    until(lambda: tight.listener.open_connections == 0)
    with tight.connected() as again:
        assert again.exchange(ask).status == 200


@pytest.mark.case(76)
def test_large_answer_gets_503_while_another_is_not_read_and_comes_back(tight: Served) -> None:
    reader = slow_reader(tight)
    with reader.sock:
        reader.send(RECORDS)
        until(lambda: tight.answers.left < 5_000_000)
        with tight.connected() as other:
            assert other.exchange(RECORDS).status == 503
            until(lambda: tight.answers.left == 5_000_000)  # the one that is not read is ended
            answer = other.exchange(RECORDS)
            assert (answer.status, records_of(answer.body)) == (200, 3_000_000)


@pytest.mark.case(76)
@pytest.mark.parametrize("drip", [0, 1])  # bytes at a time
def test_client_that_does_not_read_on_is_ended(tight: Served, drip: int) -> None:
    reader = slow_reader(tight)
    started = time.monotonic()
    with reader.sock:
        reader.send(RECORDS)
        until(lambda: tight.listener.open_connections == 1)
        while tight.listener.open_connections:
            assert time.monotonic() - started < 10
            if drip:
                reader.sock.recv(drip)
            time.sleep(0.02)


def test_client_that_goes_while_its_answer_leaves_leaves_nothing_behind(tight: Served) -> None:
    reader = slow_reader(tight)
    with reader.sock:
        reader.send(RECORDS)
        until(lambda: tight.answers.left < 5_000_000)
    until(lambda: tight.answers.left == 5_000_000)


@pytest.mark.parametrize("close", [False, True])
def test_large_answer_is_whole_if_it_is_read_steadily(served: Served, close: bool) -> None:
    served.authority.answers = large
    reader = slow_reader(served)
    with reader.sock:
        reader.send(request("/v1/audit/records", close=close))
        time.sleep(0.2)  # by now the server waits for its client
        answer = reader.one()
        assert (answer.status, records_of(answer.body)) == (200, 3_000_000)
        assert ("connection" in answer.headers) == close
        if not close:
            assert reader.exchange(request("/v1/audit/records/1")).status == 200


def test_server_that_drains_sends_the_answer_under_way_to_its_end(served: Served) -> None:
    served.authority.answers = large
    reader = slow_reader(served)
    with reader.sock:
        reader.send(RECORDS)
        until(lambda: served.answers.left < 64 * 1024 * 1024)

        async def drain() -> None:
            for connection in list(served.shared.connections):
                connection.shutdown()

        served.on_loop(drain())
        (answer,) = reader.rest()
        assert records_of(answer.body) == 3_000_000
