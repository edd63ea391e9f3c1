"""Group work: order, sharing, failures that every waiter hears of, and an end that leaves nobody waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from keybroker.authority.convoy import Convoy, ConvoyClosedError


def test_items_that_come_while_a_trip_is_under_way_go_together_in_order() -> None:
    trips: list[list[int]] = []
    gate = threading.Event()

    def work(items: list[int]) -> list[int | Exception]:
        trips.append(items)
        gate.wait(5)
        return [item * 2 for item in items]

    async def main() -> list[int]:
        convoy = Convoy[int, int]("test", work, max_items=3)
        first = asyncio.ensure_future(convoy.submit(0))
        await asyncio.sleep(0.05)
        others = [asyncio.ensure_future(convoy.submit(number)) for number in range(1, 6)]
        await asyncio.sleep(0.05)
        gate.set()
        results = await asyncio.gather(first, *others)
        convoy.close()
        return results

    assert asyncio.run(main()) == [0, 2, 4, 6, 8, 10]
    assert trips == [[0], [1, 2, 3], [4, 5]]


def test_failed_item_fails_alone_and_failed_work_fails_all() -> None:
    def work(items: list[str]) -> list[str | Exception]:
        if "bomb" in items:
            raise RuntimeError("all")
        return [ValueError(item) if item == "bad" else item for item in items]

    async def main() -> None:
        convoy = Convoy[str, str]("test", work)
        results = await asyncio.gather(*map(convoy.submit, ("a", "bad", "b")), return_exceptions=True)
        assert [type(result) for result in results] == [str, ValueError, str]
        results = await asyncio.gather(*map(convoy.submit, ("a", "bomb")), return_exceptions=True)
        assert [type(result) for result in results] == [RuntimeError, RuntimeError]
        assert await convoy.submit("after") == "after"
        convoy.close()

    asyncio.run(main())


def test_work_goes_on_when_the_one_who_waits_goes_away() -> None:
    done: list[int] = []

    def work(items: list[int]) -> list[int | Exception]:
        done.extend(items)
        return [*items]

    async def main() -> None:
        convoy = Convoy[int, int]("test", work)
        waiting = asyncio.ensure_future(convoy.submit(1))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await convoy.submit(2) == 2
        convoy.close()

    asyncio.run(main())
    assert done == [1, 2]


def test_rest_comes_after_the_answers_and_before_the_next_trip() -> None:
    story: list[str] = []
    resting = threading.Event()

    def work(items: list[str]) -> list[str | Exception]:
        story.extend(items)
        return [*items]

    def rest() -> None:
        resting.wait(5)
        story.append("rest")

    async def main() -> None:
        convoy = Convoy[str, str]("test", work, rest)
        await asyncio.wait_for(convoy.submit("a"), 3)  # answered while the rest goes on
        second = asyncio.ensure_future(convoy.submit("b"))
        await asyncio.sleep(0.05)
        resting.set()
        await second
        convoy.close()

    asyncio.run(main())
    assert story == ["a", "rest", "b", "rest"]


def test_nobody_waits_for_ever_when_it_is_closed() -> None:
    gate, begun = threading.Event(), threading.Event()

    def work(items: list[int]) -> list[int | Exception]:
        begun.set()
        gate.wait(5)
        return [*items]

    async def main() -> None:
        convoy = Convoy[int, int]("test", work)
        under_way = asyncio.ensure_future(convoy.submit(1))
        await asyncio.to_thread(begun.wait, 5)
        left_behind = asyncio.ensure_future(convoy.submit(2))
        await asyncio.sleep(0)
        threading.Timer(0.1, gate.set).start()
        convoy.close()
        assert await under_way == 1
        with pytest.raises(ConvoyClosedError):
            await left_behind
        with pytest.raises(ConvoyClosedError):
            await convoy.submit(3)

    asyncio.run(main())
