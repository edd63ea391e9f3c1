"""Turns: how many, in which order, who loses his, and that none is lost for good."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from keybroker.frontend.turns import Turn, Turns


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await test()

    asyncio.run(main())


async def soon() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def never_lost() -> None:
    raise AssertionError("a turn was lost that nobody needed")


class Crowd:
    """Handshakes that wait for their turn; `order` is who has had one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.order: list[str] = []
        self.having: dict[str, Turn] = {}

    def join(self, name: str, address: str, *, is_known: bool = False, lose: Callable[[], object] = never_lost) -> asyncio.Task[None]:
        async def wait() -> None:
            self.having[name] = await self.turns.take(address, lose, is_known=is_known)
            self.order.append(name)

        return asyncio.get_running_loop().create_task(wait())

    def end(self, name: str) -> None:
        self.turns.end(self.having.pop(name))


def test_no_more_go_on_at_once_than_there_are_turns() -> None:
    async def test() -> None:
        crowd = Crowd(Turns(2, patience_s=60))
        tasks = [crowd.join(f"{number}", "a") for number in range(5)]
        await soon()
        assert crowd.order == ["0", "1"]
        assert crowd.turns.going == 2
        for number in range(5):
            crowd.end(f"{number}")
            await soon()
        assert crowd.order == [f"{number}" for number in range(5)]
        assert crowd.turns.going == 0
        await asyncio.gather(*tasks)

    run(test)


def test_one_more_begins_each_time_around_the_loop() -> None:
    async def test() -> None:
        crowd = Crowd(Turns(10, patience_s=60))
        for number in range(6):
            crowd.join(f"{number}", "a")
        seen = []
        for _ in range(12):
            seen.append(crowd.turns.going)
            await asyncio.sleep(0)
        assert max(later - earlier for earlier, later in itertools.pairwise(seen)) == 1
        assert seen[-1] == 6

    run(test)


@pytest.mark.case(77)
def test_address_with_one_handshake_does_not_wait_for_all_of_another() -> None:
    async def test() -> None:
        crowd = Crowd(Turns(1, patience_s=60))
        for number in range(50):
            crowd.join(f"a{number}", "a")
        await soon()
        crowd.join("b", "b")
        await soon()
        for _ in range(2):
            crowd.end(crowd.order[-1])
            await soon()
        assert crowd.order[0] == "a0"
        assert "b" in crowd.order[1:]

    run(test)


@pytest.mark.case(77)
def test_known_address_comes_before_strangers() -> None:
    async def test() -> None:
        crowd = Crowd(Turns(1, patience_s=60))
        for number in range(50):
            crowd.join(f"{number}", f"address {number}")
        await soon()
        crowd.join("known", "k", is_known=True)
        await soon()
        crowd.end("0")
        await soon()
        assert crowd.order == ["0", "known"]

    run(test)


@pytest.mark.case(77)
def test_handshake_that_takes_too_long_loses_its_turn_to_one_that_waits() -> None:
    async def test() -> None:
        lost = []
        crowd = Crowd(Turns(2, patience_s=0.02))
        crowd.join("slow", "a", lose=lambda: lost.append("slow"))
        await soon()
        crowd.join("slower", "b", lose=lambda: lost.append("slower"))
        crowd.join("waits", "c")
        await soon()
        assert lost == []
        while not lost:
            await asyncio.sleep(0.005)
        await soon()
        assert lost == ["slow"]
        assert crowd.order == ["slow", "slower", "waits"]
        assert crowd.turns.going == 2
        crowd.end("slow")  # its task ends later
        assert crowd.turns.going == 2

    run(test)


def test_handshake_may_take_its_time_while_nobody_waits() -> None:
    async def test() -> None:
        crowd = Crowd(Turns(1, patience_s=0.01))
        crowd.join("slow", "a")
        await asyncio.sleep(0.05)
        crowd.end("slow")
        crowd.join("next", "a")
        await soon()
        assert crowd.order == ["slow", "next"]

    run(test)


@pytest.mark.parametrize("after", [0, 1, 2, 3])  # times around the loop: before, when and after the turn is granted
def test_turn_of_one_who_waits_no_more_goes_to_the_next(after: int) -> None:
    async def test() -> None:
        crowd = Crowd(Turns(1, patience_s=60))
        crowd.join("first", "a")
        await soon()
        leaves = crowd.join("leaves", "b")
        crowd.join("next", "c")
        await soon()
        crowd.end("first")
        for _ in range(after):
            await asyncio.sleep(0)
        leaves.cancel()
        await soon()
        if "leaves" in crowd.having:
            crowd.end("leaves")
            await soon()
        assert "next" in crowd.order
        assert crowd.turns.going == 1

    run(test)
