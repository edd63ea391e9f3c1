"""What only tasks can do to a client: run at once, be cancelled, and outlive each other. Real TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
import uvloop

from keybroker.client import AsyncClient, BrokerUnreachableError, transport
from tests.integration.client.servers import Connection, Place, Server, every, whoami
from tests.worlds import until

RECORD = {"index": 0, "time": "t", "kind": "read", "trail": {}, "key": {}, "use": "", "outcome": ""}


def client_of(server: Server, place: Place, timeout_s: float = 10) -> AsyncClient:
    return AsyncClient(server.url, svid=place.svid, bundle=place.bundle, timeout_s=timeout_s)


def key_named_in(connection: Connection, request: bytes) -> None:
    name = request.split(b" ")[1].rpartition(b"/")[2].decode()
    connection.answer({"name": name, "labels": {}, "algorithms": [], "versions": []})


def signs_on_cue(connection: Connection, request: bytes) -> None:
    """Holds signatures back until the test says so; answers everything else."""
    if request.startswith(b"POST"):
        assert connection.server.cue.acquire(timeout=10)
    whoami(connection, request)


@contextlib.asynccontextmanager
async def signing(broker: AsyncClient, server: Server) -> AsyncIterator[asyncio.Task[str]]:
    """A task that waits for a signature: its request is there, and unanswered."""

    async def sign() -> str:
        return (await broker.sign("orders", "ES256", message=b"x")).use

    task = asyncio.create_task(sign())
    while not any(request.startswith(b"POST") for request in server.requests):
        await asyncio.sleep(0.01)
    yield task
    for _ in range(10):
        server.cue.release()


def test_many_tasks_share_one_client_and_each_gets_its_own_answer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MAX_CONNECTIONS", 20)
    names = [f"key-{number}" for number in range(200)]

    async def ask() -> list[str]:
        async with client_of(server, place) as broker:
            return [key.name for key in await asyncio.gather(*map(broker.key, names))]

    with Server(place.server_context(), every(key_named_in)) as server:
        assert asyncio.run(ask()) == names
        assert 1 < server.accepted <= 20


def test_other_tasks_run_while_one_waits(place: Place) -> None:
    async def ask() -> None:
        async with client_of(server, place) as broker, signing(broker, server) as task:
            for _ in range(3):
                await broker.whoami()
            assert not task.done()
            server.cue.release()
            assert await task == "01J"

    with Server(place.server_context(), every(signs_on_cue)) as server:
        asyncio.run(ask())
        assert server.accepted == 2


def test_cancelled_call_ends_its_own_connection_only(place: Place) -> None:
    async def ask() -> None:
        async with client_of(server, place) as broker, signing(broker, server) as task:
            await broker.whoami()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.cue.release()
            await asyncio.to_thread(until, lambda: server.ended == 1)
            await broker.whoami()
            server.cue.release()
            await broker.sign("orders", "ES256", message=b"x")

    with Server(place.server_context(), every(signs_on_cue)) as server:
        asyncio.run(ask())
        assert server.accepted == 2


def test_time_limit_of_the_caller_is_the_callers(place: Place) -> None:
    async def ask() -> None:
        async with client_of(server, place) as broker:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1.5):
                    await broker.sign("orders", "ES256", message=b"x")
            assert await broker.whoami()
        async with client_of(server, place, timeout_s=1.5) as broker:
            with pytest.raises(BrokerUnreachableError):
                await broker.sign("orders", "ES256", message=b"x")
            assert await broker.whoami()
        server.cue.release()
        server.cue.release()

    with Server(place.server_context(), every(signs_on_cue)) as server:
        asyncio.run(ask())


def test_calls_that_are_under_way_end_well_when_the_svid_is_renewed(place: Place) -> None:
    async def ask() -> None:
        async with client_of(server, place) as broker, signing(broker, server) as task:
            place.svid.touch()
            await broker.whoami()
            assert server.accepted == 2
            assert server.ended == 0
            server.cue.release()
            assert await task == "01J"
            await asyncio.to_thread(until, lambda: server.ended == 1)
            await broker.whoami()
            assert server.accepted == 2

    with Server(place.server_context(), every(signs_on_cue)) as server:
        asyncio.run(ask())


def test_call_that_is_under_way_ends_well_when_the_client_is_closed(place: Place) -> None:
    async def ask() -> None:
        broker = client_of(server, place)
        async with signing(broker, server) as task:
            await broker.aclose()
            with pytest.raises(RuntimeError, match="closed"):
                await broker.whoami()
            assert server.ended == 0
            server.cue.release()
            assert await task == "01J"
            await asyncio.to_thread(until, lambda: server.ended == 1)

    with Server(place.server_context(), every(signs_on_cue)) as server:
        asyncio.run(ask())


def test_records_come_page_by_page_until_the_last(place: Place) -> None:
    def page(connection: Connection, request: bytes) -> None:
        query = request.split(b" ")[1]
        assert b"kind=denial" in query
        number = int(query.partition(b"cursor=")[2].partition(b"&")[0] or b"0")
        connection.answer({"records": [{**RECORD, "index": number}], "next": str(number + 1) if number < 4 else None})

    async def ask() -> list[int]:
        async with client_of(server, place) as broker:
            return [record.index async for record in broker.iter_records(kind="denial", since="")]

    with Server(place.server_context(), every(page)) as server:
        assert asyncio.run(ask()) == [0, 1, 2, 3, 4]
        assert b"since" not in server.received


def test_client_works_on_uvloop(place: Place) -> None:
    async def ask() -> None:
        async with client_of(server, place) as broker:
            await asyncio.gather(*(broker.key(f"key-{number}") for number in range(50)))

    with Server(place.server_context(), every(key_named_in)) as server:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(ask())
        assert len(server.requests) == 50
