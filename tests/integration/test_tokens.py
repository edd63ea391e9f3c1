"""Workers as the authority sees them, over real sockets: in service, lost, lying, and keys that must not be used."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from keybroker.authority.generation import Generation
from keybroker.authority.journal import Journal
from keybroker.authority.keyring import Keyring
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.authority.tokens import SigningFailedError, TokenPool
from keybroker.config import AuthorityConfig, KeyConfig, KeyVersionConfig, TokenLink
from keybroker.errors import HsmUnavailableError
from keybroker.model.key import Algorithm
from keybroker.model.task import (
    MAX_TASK_BYTES,
    Alive,
    AnyProduct,
    KeyOpened,
    KeyRefused,
    OpenKey,
    Probe,
    RawSignature,
    Result,
    SignTask,
    Task,
    TaskFailed,
)
from keybroker.wire import Channel, Listener
from tests.brokers import LOG, read_leaves
from tests.clocks import FixedClock

SPKI = b"spki-of-orders"


@dataclass(slots=True)
class FakeWorker:
    """A worker process, as far as frames go."""

    path: Path
    spki: bytes = SPKI
    refuses: str = ""
    answer: Any = field(default_factory=lambda: RawSignature(b"signature", 1))
    signed: int = 0
    channels: list[Channel[Task, Result]] = field(default_factory=list)

    def on_task(self, channel: Channel[Task, Result], task: Task) -> None:
        if channel not in self.channels:
            self.channels.append(channel)
        product: AnyProduct
        match task.work:
            case Probe():
                product = Alive("01", "fake", 1)
            case OpenKey(ref):
                product = KeyRefused(ref, self.refuses, "cure") if self.refuses else KeyOpened(ref, "ec-p256", 256, self.spki)
            case SignTask():
                self.signed += 1
                if self.answer is None:
                    return
                product = self.answer
        channel.send(Result(task.id, product))

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        async with Listener[Task, Result](
            self.path, os.getuid(), Task, MAX_TASK_BYTES, self.on_task, lambda _channel, _why: None
        ).serving():
            yield
            for channel in self.channels:
                channel.close()


def config_of(state: Path, count: int) -> AuthorityConfig:
    return AuthorityConfig(
        socket=state / "a.sock",
        state=state,
        log=LOG,
        bundles={},
        grants=state,
        tokens={"fake": TokenLink(sockets=tuple(state / f"w{n}.sock" for n in range(count)), deadline_ms=300)},
        keys={"orders": KeyConfig(token="fake", versions=(KeyVersionConfig(version=1, object="orders"),))},
    )


@contextlib.asynccontextmanager
async def pool_of(state: Path, count: int) -> AsyncIterator[tuple[TokenPool, Keyring, Journal]]:
    config = config_of(state, count)
    store = SqliteStore.open(state)
    pins = store.pins()
    clock = FixedClock()
    journal = Journal(store, clock, LOG, Generation(), lambda _err: None)
    keyring = Keyring(config, pins, journal, clock)
    pool = TokenPool.of(config.tokens, keyring.to_open(), keyring.judge)
    pool.start()
    try:
        yield pool, keyring, journal
    finally:
        await pool.stop()
        journal.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.005)


def sign(pool: TokenPool) -> Any:
    return pool.sign("fake", "orders/1", Algorithm.ES256, bytes(32))


def test_key_is_pinned_once_and_on_record_when_workers_show_it(tmp_path: Path) -> None:
    async def main() -> None:
        workers = [FakeWorker(tmp_path / f"w{n}.sock") for n in range(3)]
        async with workers[0].serving(), workers[1].serving(), workers[2].serving(), pool_of(tmp_path, 3) as (pool, keyring, _):
            await until(lambda: pool.sessions() == {"fake": (3, 3)})
            entry = keyring.find("orders")
            assert entry is not None
            assert entry.current is not None
            assert entry.current.spki == SPKI
            assert (await sign(pool)).raw == b"signature"
        leaves = read_leaves(tmp_path)
        assert len(leaves) == 1
        assert b"key-pinned" in leaves[0]

    asyncio.run(main())


def test_token_that_shows_another_public_key_is_refused_and_recorded_and_never_asked(tmp_path: Path) -> None:
    async def main() -> None:
        good, other = FakeWorker(tmp_path / "w0.sock"), FakeWorker(tmp_path / "w1.sock", spki=b"another")
        async with good.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
        async with good.serving(), other.serving(), pool_of(tmp_path, 2) as (pool, keyring, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            for _ in range(6):
                await sign(pool)
            assert (good.signed, other.signed) == (6, 0)
            assert keyring.refusals() == {"orders/1": "key-is-not-the-pinned-one"}
        assert b"key-is-not-the-pinned-one" in read_leaves(tmp_path)[-1]

    asyncio.run(main())


@pytest.mark.case(52)
def test_refused_key_is_recorded_and_not_available(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", refuses="key-extractable")
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, keyring, _):
            await until(lambda: pool.sessions() == {"fake": (1, 1)})
            assert keyring.refusals() == {"orders/1": "key-extractable"}
            with pytest.raises(HsmUnavailableError):
                await sign(pool)
        assert b"key-refused" in read_leaves(tmp_path)[0]

    asyncio.run(main())


@pytest.mark.case(43)
def test_second_worker_is_tried_once_when_the_first_lost_its_session(tmp_path: Path) -> None:
    async def main() -> None:
        failing = TaskFailed("CKR_SESSION_HANDLE_INVALID", may_have_signed=False, is_session_lost=True)
        workers = [FakeWorker(tmp_path / "w0.sock", answer=failing), FakeWorker(tmp_path / "w1.sock")]
        async with workers[0].serving(), workers[1].serving(), pool_of(tmp_path, 2) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            assert (await sign(pool)).worker == "fake-1"
            workers[1].answer = failing
            with pytest.raises(SigningFailedError):
                await sign(pool)
            assert workers[0].signed + workers[1].signed == 4

    asyncio.run(main())


@pytest.mark.case(48)
@pytest.mark.parametrize("ckr", ["CKR_GENERAL_ERROR", "0x80000001"])
def test_no_second_try_when_the_token_may_have_signed(tmp_path: Path, ckr: str) -> None:
    async def main() -> None:
        failing = TaskFailed(ckr, may_have_signed=True, is_session_lost=False)
        workers = [FakeWorker(tmp_path / "w0.sock", answer=failing), FakeWorker(tmp_path / "w1.sock", answer=failing)]
        async with workers[0].serving(), workers[1].serving(), pool_of(tmp_path, 2) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            with pytest.raises(SigningFailedError) as caught:
                await sign(pool)
            assert (caught.value.ckr, caught.value.may_have_signed) == (ckr, True)
            assert workers[0].signed + workers[1].signed == 1

    asyncio.run(main())


@pytest.mark.case(46)
def test_late_answer_is_dropped_and_the_worker_goes_on(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
            with pytest.raises(SigningFailedError) as caught:
                await sign(pool)
            assert (caught.value.ckr, caught.value.may_have_signed) == ("timeout", True)
            worker.channels[-1].send(Result(3, RawSignature(b"late", 1)))
            worker.answer = RawSignature(b"fresh", 1)
            assert (await sign(pool)).raw == b"fresh"

    asyncio.run(main())


@pytest.mark.case(47)
def test_use_is_unknown_when_the_worker_dies_under_way_and_the_next_finds_its_successor(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with pool_of(tmp_path, 1) as (pool, _, _):
            async with worker.serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                waiting = asyncio.ensure_future(sign(pool))
                await until(lambda: worker.signed == 1)
            with pytest.raises(SigningFailedError) as caught:
                await waiting
            assert (caught.value.ckr, caught.value.may_have_signed) == ("worker-lost", True)
            with pytest.raises(HsmUnavailableError):
                await sign(pool)
            async with FakeWorker(tmp_path / "w0.sock").serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                assert (await sign(pool)).raw == b"signature"

    asyncio.run(main())


@pytest.mark.case(49)
def test_distrusted_worker_is_out_of_service_and_the_other_serves(tmp_path: Path) -> None:
    async def main() -> None:
        workers = [FakeWorker(tmp_path / "w0.sock"), FakeWorker(tmp_path / "w1.sock")]
        async with workers[0].serving(), workers[1].serving(), pool_of(tmp_path, 2) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            pool.distrust("fake-0")
            assert pool.sessions() == {"fake": (1, 2)}
            assert [(await sign(pool)).worker for _ in range(4)] == ["fake-1"] * 4
            pool.distrust("fake-1")
            with pytest.raises(HsmUnavailableError):
                await sign(pool)

    asyncio.run(main())
