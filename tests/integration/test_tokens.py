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

from keybroker.authority import tokens
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Journal
from keybroker.authority.keyring import Keyring
from keybroker.authority.store.sqlite import SqliteStore
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.tokens import SigningFailedError, TokenPool
from keybroker.config import AuthorityConfig, KeyConfig, KeyVersionConfig, TokenLink
from keybroker.errors import HsmUnavailableError, OverloadedError
from keybroker.model.key import Algorithm
from keybroker.model.task import (
    MAX_TASK_BYTES,
    Alive,
    AnyProduct,
    KeyOpened,
    KeyRefused,
    NeedsOperator,
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
    family: str = "ec-p256"
    refuses: str = ""
    needs_operator: str = ""
    is_full: bool = False
    watchdog_ms: int = 0
    answers_for: str = ""
    open_fails: str = ""
    answer: Any = field(default_factory=lambda: RawSignature(b"signature", 1))
    probed: int = 0
    signed: int = 0
    unanswered: list[int] = field(default_factory=list)
    channels: list[Channel[Task, Result]] = field(default_factory=list)

    def on_task(self, channel: Channel[Task, Result], task: Task) -> None:
        if channel not in self.channels:
            self.channels.append(channel)
        product: AnyProduct
        match task.work:
            case Probe() if self.is_full:
                channel.send(Result(task.id, TaskFailed("CKR_SESSION_COUNT", may_have_signed=False, is_session_lost=True)))
                channel.close()
                return
            case Probe():
                self.probed += 1
                product = NeedsOperator(self.needs_operator) if self.needs_operator else Alive("01", "fake", 1, self.watchdog_ms)
            case OpenKey(ref) if self.open_fails:
                product = TaskFailed(self.open_fails, may_have_signed=True, is_session_lost=False)
            case OpenKey(ref):
                product = (
                    KeyRefused(ref, self.refuses, "cure")
                    if self.refuses
                    else KeyOpened(self.answers_for or ref, self.family, 256, self.spki)
                )
            case SignTask():
                self.signed += 1
                if self.answer is None:
                    self.unanswered.append(task.id)
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
async def pool_of(state: Path, count: int, noted: list[tuple[str, ...]] | None = None) -> AsyncIterator[tuple[TokenPool, Keyring, Journal]]:
    noted = [] if noted is None else noted
    config = config_of(state, count)
    store = SqliteStore.open(state)
    pins = store.pins()
    clock = FixedClock()
    journal = Journal(store, LOG, Generation(), Timekeeper(clock, None, 0, 86_400), lambda _err: None)
    keyring = Keyring(config, pins, journal, clock)
    pool = TokenPool.of(config.tokens, keyring.to_open(), keyring.judge, lambda *event: noted.append(event))
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


LOST = TaskFailed("CKR_SESSION_HANDLE_INVALID", may_have_signed=False, is_session_lost=True)


@pytest.mark.case(43)
def test_second_worker_is_tried_when_the_first_lost_its_session_and_the_first_is_not_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        workers = [FakeWorker(tmp_path / "w0.sock", answer=LOST), FakeWorker(tmp_path / "w1.sock")]
        async with workers[0].serving(), workers[1].serving(), pool_of(tmp_path, 2) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            assert [(await sign(pool)).worker for _ in range(3)] == ["fake-1"] * 3
            assert (workers[0].signed, workers[1].signed) == (1, 3)
            assert pool.sessions() == {"fake": (1, 2)}

    asyncio.run(main())


@pytest.mark.case(43)
def test_third_worker_is_not_tried_when_two_lost_their_sessions(tmp_path: Path) -> None:
    async def main() -> None:
        workers = [FakeWorker(tmp_path / f"w{n}.sock", answer=LOST) for n in range(3)]
        async with workers[0].serving(), workers[1].serving(), workers[2].serving(), pool_of(tmp_path, 3) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (3, 3)})
            with pytest.raises(SigningFailedError) as caught:
                await sign(pool)
            assert (caught.value.ckr, caught.value.may_have_signed) == (LOST.ckr, False)
            assert sum(worker.signed for worker in workers) == 2

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
            assert not pool.is_available("fake", "orders/1")  # it has not said a word since
            with pytest.raises(HsmUnavailableError):
                await sign(pool)
            worker.channels[-1].send(Result(worker.unanswered[0], RawSignature(b"late", 1)))
            worker.answer = RawSignature(b"fresh", 1)
            await until(lambda: pool.is_available("fake", "orders/1"))
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


@pytest.mark.case(47)
def test_only_the_oldest_task_of_a_dead_worker_is_in_doubt_and_the_others_are_done_elsewhere(tmp_path: Path) -> None:
    async def main() -> None:
        hung, other = FakeWorker(tmp_path / "w0.sock", answer=None), FakeWorker(tmp_path / "w1.sock", answer=None)
        async with pool_of(tmp_path, 2) as (pool, _, _), other.serving():
            async with hung.serving():
                await until(lambda: pool.sessions() == {"fake": (2, 2)})
                waiting = [asyncio.ensure_future(sign(pool)) for _ in range(8)]
                await until(lambda: hung.signed == 4 and other.signed == 4)
                other.answer = RawSignature(b"signature", 1)
                for number in other.unanswered:
                    other.channels[-1].send(Result(number, other.answer))
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            (doubtful,) = (answer for answer in answers if isinstance(answer, BaseException))
            assert isinstance(doubtful, SigningFailedError)
            assert (doubtful.ckr, doubtful.may_have_signed) == ("worker-lost", True)
            assert [answer.worker for answer in answers if not isinstance(answer, BaseException)] == ["fake-1"] * 7
            assert (hung.signed, other.signed) == (4, 7)

    asyncio.run(main())


@pytest.mark.case(47)
def test_task_behind_a_dead_worker_certainly_made_no_signature_when_there_is_no_other(tmp_path: Path) -> None:
    async def main() -> None:
        hung = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with pool_of(tmp_path, 1) as (pool, _, _):
            async with hung.serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                waiting = [asyncio.ensure_future(sign(pool)) for _ in range(3)]
                await until(lambda: hung.signed == 3)
            failures = await asyncio.gather(*waiting, return_exceptions=True)
        assert [isinstance(each, SigningFailedError) and each.may_have_signed for each in failures] == [True, False, False]

    asyncio.run(main())


@pytest.mark.case(43)
def test_nothing_is_in_doubt_when_the_worker_said_that_its_session_is_lost(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with pool_of(tmp_path, 1) as (pool, _, _):
            async with worker.serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                waiting = [asyncio.ensure_future(sign(pool)) for _ in range(3)]
                await until(lambda: worker.signed == 3)
                worker.channels[-1].send(Result(worker.unanswered[0], LOST))
                await until(lambda: not pool.is_available("fake", "orders/1"))
                assert pool.troubles() == {"fake": "lost its session: CKR_SESSION_HANDLE_INVALID"}
            failures = await asyncio.gather(*waiting, return_exceptions=True)
        assert [(each.ckr, each.may_have_signed) for each in failures if isinstance(each, SigningFailedError)] == [
            ("CKR_SESSION_HANDLE_INVALID", False),
            ("worker-lost", False),
            ("worker-lost", False),
        ]

    asyncio.run(main())


@pytest.mark.case(47)
@pytest.mark.parametrize(("watchdog_ms", "ckr"), [(150, "timeout"), (250, "worker-lost"), (0, "worker-lost")])
def test_worker_that_dies_when_its_watchdog_would_kill_it_timed_out(tmp_path: Path, watchdog_ms: int, ckr: str) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None, watchdog_ms=watchdog_ms)
        async with pool_of(tmp_path, 1) as (pool, _, _):
            async with worker.serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                waiting = asyncio.ensure_future(sign(pool))
                await until(lambda: worker.signed == 1)
                await asyncio.sleep(0.18)
            with pytest.raises(SigningFailedError) as caught:
                await waiting
            assert (caught.value.ckr, caught.value.may_have_signed) == (ckr, True)

    asyncio.run(main())


@pytest.mark.case(46)
def test_slow_worker_that_goes_on_answering_stays_in_service_when_one_request_times_out(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
            waiting = [asyncio.ensure_future(sign(pool)) for _ in range(2)]
            await until(lambda: worker.signed == 2)
            await asyncio.sleep(0.15)
            worker.channels[-1].send(Result(worker.unanswered[0], RawSignature(b"slow", 1)))
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert not isinstance(answers[0], BaseException)
            assert isinstance(answers[1], SigningFailedError)
            assert pool.is_available("fake", "orders/1")

    asyncio.run(main())


@pytest.mark.case(54)
def test_queue_of_a_worker_is_bounded_and_the_next_request_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_TASKS_PER_WORKER", 5)

    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=None)
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
            waiting = [asyncio.ensure_future(sign(pool)) for _ in range(8)]
            answers = await asyncio.gather(*waiting, return_exceptions=True)
            assert [type(each) for each in answers] == [SigningFailedError] * 5 + [OverloadedError] * 3
            assert worker.signed == 5

    asyncio.run(main())


@pytest.mark.case(54)
@pytest.mark.parametrize("becomes_free", [False, True])
def test_request_waits_a_bounded_time_for_a_session_and_is_then_told_of_an_overload(tmp_path: Path, *, becomes_free: bool) -> None:
    async def main() -> None:
        async with pool_of(tmp_path, 1) as (pool, _, _):
            async with FakeWorker(tmp_path / "w0.sock", is_full=True).serving():
                await until(lambda: pool.troubles() == {"fake": "the token has no session left"})
            waiting = asyncio.ensure_future(pool.wait("fake", "orders/1"))
            await asyncio.sleep(0.1)
            assert not waiting.done()
            if becomes_free:
                async with FakeWorker(tmp_path / "w0.sock").serving():
                    await waiting
                    await sign(pool)
                return
            with pytest.raises(OverloadedError) as caught:
                await asyncio.wait_for(waiting, 10)
            assert caught.value.retry_after == 1

    asyncio.run(main())


@pytest.mark.case(54)
def test_request_is_refused_at_once_where_it_is_no_session_that_is_missing(tmp_path: Path) -> None:
    async def main() -> None:
        async with pool_of(tmp_path, 1) as (pool, _, _):
            with pytest.raises(HsmUnavailableError):
                await asyncio.wait_for(pool.wait("fake", "orders/1"), 0.5)

    asyncio.run(main())


@pytest.mark.case(45)
def test_token_that_needs_an_operator_says_so_and_is_never_asked_to_sign(tmp_path: Path) -> None:
    async def main() -> None:
        noted: list[tuple[str, ...]] = []
        async with pool_of(tmp_path, 1, noted) as (pool, _, _):
            closed = FakeWorker(tmp_path / "w0.sock", needs_operator="CKR_PIN_LOCKED")
            async with closed.serving():
                await until(lambda: pool.troubles() == {"fake": "needs an operator: CKR_PIN_LOCKED"})
                with pytest.raises(HsmUnavailableError):
                    await sign(pool)
                await asyncio.sleep(0.7)
                assert (closed.probed, closed.signed) == (1, 0)
            assert noted == [("token-needs-operator", "fake: CKR_PIN_LOCKED")]
            async with FakeWorker(tmp_path / "w0.sock").serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                assert pool.troubles() == {}

    asyncio.run(main())


def test_key_that_the_token_could_not_look_for_is_looked_for_again_while_the_others_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_RETRY_SECONDS", 0.05)

    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", open_fails="CKR_GENERAL_ERROR")
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, keyring, _):
            await until(lambda: pool.sessions() == {"fake": (1, 1)})
            assert keyring.refusals() == {"orders/1": "CKR_GENERAL_ERROR"}
            assert not pool.is_available("fake", "orders/1")
            worker.open_fails = ""
            await until(lambda: pool.is_available("fake", "orders/1"))
            assert keyring.refusals() == {}
        assert sum(b"key-refused" in leaf for leaf in read_leaves(tmp_path)) == 1

    asyncio.run(main())


def test_key_that_one_worker_refuses_stays_visible_while_another_has_it(tmp_path: Path) -> None:
    async def main() -> None:
        good, bad = FakeWorker(tmp_path / "w0.sock"), FakeWorker(tmp_path / "w1.sock", refuses="key-missing")
        async with pool_of(tmp_path, 2) as (pool, keyring, _), bad.serving():
            await until(lambda: keyring.refusals() == {"orders/1": "key-missing"})
            async with good.serving():
                await until(lambda: pool.is_available("fake", "orders/1"))
                assert keyring.refusals() == {"orders/1": "key-missing"}

    asyncio.run(main())


@pytest.mark.case(49)
def test_distrusted_worker_is_out_of_service_and_the_other_serves(tmp_path: Path) -> None:
    async def main() -> None:
        workers = [FakeWorker(tmp_path / "w0.sock"), FakeWorker(tmp_path / "w1.sock")]
        async with workers[0].serving(), workers[1].serving(), pool_of(tmp_path, 2) as (pool, _, _):
            await until(lambda: pool.sessions() == {"fake": (2, 2)})
            pool.distrust("fake-0")
            assert pool.sessions() == {"fake": (1, 2)}
            assert pool.troubles() == {"fake": "returned a signature that does not verify"}
            assert [(await sign(pool)).worker for _ in range(4)] == ["fake-1"] * 4
            pool.distrust("fake-1")
            with pytest.raises(HsmUnavailableError):
                await sign(pool)

    asyncio.run(main())


@pytest.mark.case(49)
def test_distrusted_worker_is_asked_for_token_and_keys_anew_before_it_serves_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "DISTRUST_SECONDS", 0.3)

    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock")
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, keyring, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
            pool.distrust("fake-0")
            worker.channels[-1].close()  # a connection that comes back does not shorten the time
            await asyncio.sleep(0.1)
            assert (worker.probed, pool.sessions()) == (1, {"fake": (0, 1)})
            await until(lambda: pool.is_available("fake", "orders/1"))
            assert worker.probed == 2
            pool.distrust("fake-0")
            worker.spki = b"another"  # what came back is another token
            await until(lambda: "key-is-not-the-pinned-one" in keyring.refusals().get("orders/1", ""))
            assert not pool.is_available("fake", "orders/1")

    asyncio.run(main())


def test_worker_that_answers_for_another_key_pins_nothing_and_stays_out_of_service(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answers_for="release/1")
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.troubles() == {"fake": "the worker answers for another key"})
            assert not pool.is_available("fake", "orders/1")
        assert read_leaves(tmp_path) == []

    asyncio.run(main())


def test_key_of_a_family_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", family="ec-unknown")
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, keyring, _):
            await until(lambda: pool.sessions() == {"fake": (1, 1)})
            assert keyring.refusals() == {"orders/1": "key-unsupported"}

    asyncio.run(main())


@pytest.mark.parametrize("ckr", ["x" * 65, "CKR_\n", "", "CKR_É"])
def test_worker_that_gives_a_failure_an_odd_name_is_cut_off(tmp_path: Path, ckr: str) -> None:
    """The name goes on record: it must not fill it, nor say what is not printable."""

    async def main() -> None:
        worker = FakeWorker(tmp_path / "w0.sock", answer=TaskFailed(ckr, may_have_signed=False, is_session_lost=False))
        async with worker.serving(), pool_of(tmp_path, 1) as (pool, _, _):
            await until(lambda: pool.is_available("fake", "orders/1"))
            with pytest.raises(SigningFailedError) as caught:
                await sign(pool)
            assert (caught.value.ckr, caught.value.may_have_signed) == ("worker-lost", True)

    asyncio.run(main())
