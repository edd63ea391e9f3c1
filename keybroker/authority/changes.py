"""Long polls: callers who wait until something happens to an operation. Bounded, in all and for each caller."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Self

from keybroker.errors import OverloadedError, RateLimitedError

MAX_WAITERS = 256
MAX_WAITERS_PER_CALLER = 16
REST_SECONDS = 0.1  # between two looks of one waiter, however much happens


class Changes:
    """Tells those who wait that something has happened. What, they have to look up.

    Attributes:
        count: of what has happened so far. Read before looking, it says afterwards whether to look again.
    """

    def __init__(self) -> None:
        self.count = 0
        self._happened: asyncio.Future[None] | None = None
        self._waiters: Counter[str] = Counter()
        self._is_closed = False

    @property
    def waiters(self) -> int:
        """Callers who wait."""
        return self._waiters.total()

    def announce(self) -> None:
        """Something has happened to an operation."""
        self.count += 1
        if self._happened is not None and not self._happened.done():
            self._happened.set_result(None)
        self._happened = None

    def close(self) -> None:
        """Nobody waits any more, from now on."""
        self._is_closed = True
        self.announce()

    def enter(self, caller: str) -> Waiter:
        """A place among those who wait. To be left.

        Raises:
            RateLimitedError: this caller has as many as it may.
            OverloadedError: all are taken.
        """
        if self._waiters[caller] >= MAX_WAITERS_PER_CALLER:
            raise RateLimitedError(f"{MAX_WAITERS_PER_CALLER} questions of yours wait already.", retry_after=5)
        if self.waiters >= MAX_WAITERS:
            raise OverloadedError("Too many questions wait already.", retry_after=5)
        self._waiters[caller] += 1
        return Waiter(self, caller)

    def leave(self, caller: str) -> None:
        """The place is free."""
        self._waiters[caller] -= 1
        if not self._waiters[caller]:
            del self._waiters[caller]

    async def after(self, count: int, seconds: float) -> bool:
        """Wait until something has happened after so many; False if nothing has in this time, or nobody waits any more."""
        if self._is_closed or seconds <= 0:
            return False
        if self.count != count:
            return True
        if self._happened is None:
            self._happened = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait({self._happened}, timeout=seconds)
        return bool(done) and not self._is_closed


class Waiter:
    """One place among those who wait."""

    def __init__(self, changes: Changes, caller: str) -> None:
        self._changes = changes
        self._caller = caller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._changes.leave(self._caller)

    async def wait(self, count: int, until: float) -> bool:
        """Whether something has happened after so many, before a moment of the event loop's clock: then one may look again."""
        if not await self._changes.after(count, until - asyncio.get_running_loop().time()):
            return False
        await asyncio.sleep(REST_SECONDS)
        return True
