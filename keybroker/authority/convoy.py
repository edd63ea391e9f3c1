"""Group work: whatever waits while a thread is busy goes with its next trip.

A commit costs one fsync however many records it carries; a hop to a thread costs the same for one signature check or for fifty.
So the cost per request falls as load rises, and an idle broker adds no waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")


class ConvoyClosedError(Exception):
    """No trip leaves any more."""


class Convoy(Generic[Item, Done]):
    """Calls `work` with everything that waits, one call at a time, in one thread of its own.

    Args:
        name: of the thread.
        work: takes items in the order in which they came, returns for each its result or its exception. If it raises, all
            items of the trip get that exception.
        rest: called in the same thread after each trip, when those who waited for it have been told; the next trip waits for it.
        max_items: the most that one trip carries.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[Item]], list[Done | Exception]],
        rest: Callable[[], None] = lambda: None,
        max_items: int = 512,
    ) -> None:
        self._work = work
        self._rest = rest
        self._max_items = max_items
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._waiting: list[tuple[Item, asyncio.Future[Done]]] = []
        self._is_under_way = False
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    async def submit(self, item: Item) -> Done:
        """The result for one item. The work goes on even if the one who waits goes away.

        Raises:
            ConvoyClosedError: closed before the item was taken along.
            Exception: whatever `work` has for the item.
        """
        if self._is_closed:
            raise ConvoyClosedError
        future: asyncio.Future[Done] = self._loop.create_future()
        self._waiting.append((item, future))
        if not self._is_under_way:
            self._is_under_way = True
            self._loop.call_soon(self._depart)
        return await future

    def close(self) -> None:
        """Finish the trip under way and end the thread. Whoever waits for a later trip is told that there is none."""
        self._is_closed = True
        self._executor.shutdown(wait=True)
        left, self._waiting = self._waiting, []
        self._arrive(left, [ConvoyClosedError() for _ in left])

    def _depart(self) -> None:
        if self._is_closed:
            return
        trip, self._waiting = self._waiting[: self._max_items], self._waiting[self._max_items :]
        self._executor.submit(self._travel, trip)

    def _travel(self, trip: list[tuple[Item, asyncio.Future[Done]]]) -> None:
        results: list[Done | Exception]
        try:
            results = self._work([item for item, _ in trip])
        except Exception as err:  # noqa: BLE001  whatever it is, every waiter must hear of it
            results = [err] * len(trip)
        self._loop.call_soon_threadsafe(self._arrive, trip, results)
        self._rest()

    def _arrive(self, trip: list[tuple[Item, asyncio.Future[Done]]], results: list[Done | Exception]) -> None:
        for (_, future), result in zip(trip, results, strict=True):
            if future.done():
                continue
            if isinstance(result, Exception):
                future.set_exception(result)
            else:
                future.set_result(result)
        if self._waiting:
            self._loop.call_soon(self._depart)
        else:
            self._is_under_way = False
