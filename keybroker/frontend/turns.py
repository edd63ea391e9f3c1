"""Handshakes take turns, so that a crowd of them does not keep the event loop from everybody else.

Each step of a handshake keeps the loop for up to a millisecond, and every step that is ready runs before the loop looks at anything else.
So only `MAX_TURNS` go on at the same time, and at most one more begins each time around the loop. The others wait, and addresses are
served in rotation: a thousand handshakes of one address delay a single one of another by one turn. Addresses that are known to be good
come before strangers.

Who waits for its client does not work. Where others wait for a turn, a handshake that has gone on for `PATIENCE_SECONDS` loses its
turn, so that clients that begin and then say nothing cannot keep them all: they hold the others up for that long, and have failed then.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

MAX_TURNS = 64
PATIENCE_SECONDS = 0.5


class Turn:
    """One handshake, waiting or going on."""

    __slots__ = ("address", "granted", "lose", "since", "waiting")

    def __init__(self, waiting: dict[str, deque[Turn]], address: str, lose: Callable[[], object], granted: asyncio.Future[None]) -> None:
        self.waiting = waiting
        self.address = address
        self.lose = lose
        self.granted = granted
        self.since = 0.0


class Turns:
    """Hands out turns. To be made where an event loop runs.

    Args:
        max_turns: how many handshakes go on at the same time.
        patience_s: seconds after which a turn can be lost to one who waits.
    """

    def __init__(self, max_turns: int = MAX_TURNS, patience_s: float = PATIENCE_SECONDS) -> None:
        self._loop = asyncio.get_running_loop()
        self._max_turns = max_turns
        self._patience_s = patience_s
        self._known: dict[str, deque[Turn]] = {}  # who waits, by address, in rotation: the first address is next
        self._strangers: dict[str, deque[Turn]] = {}  # as above, after these
        self._going: dict[Turn, None] = {}  # the one that began first is first
        self._is_soon = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def going(self) -> int:
        """Turns that are taken."""
        return len(self._going)

    async def take(self, address: str, lose: Callable[[], object], *, is_known: bool) -> Turn:
        """Wait for a turn. Whoever gets it ends it.

        Args:
            address: whose turn it is.
            lose: called when the turn is given to somebody else.
            is_known: to be good.
        """
        waiting = self._known if is_known else self._strangers
        turn = Turn(waiting, address, lose, self._loop.create_future())
        waiting.setdefault(address, deque()).append(turn)
        self._look_soon()
        try:
            await turn.granted
        except asyncio.CancelledError:
            self.end(turn)
            raise
        return turn

    def end(self, turn: Turn) -> None:
        """A handshake is over, or nobody waits for it any more."""
        if turn in self._going:
            del self._going[turn]
        else:
            queue = turn.waiting.get(turn.address)
            if queue and turn in queue:
                queue.remove(turn)
                if not queue:
                    del turn.waiting[turn.address]
        if self._known or self._strangers:
            self._look_soon()

    def _look_soon(self) -> None:
        if not self._is_soon:
            self._is_soon = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Let one more begin, if there is a turn for it."""
        self._is_soon = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._known and not self._strangers:
            return
        now = self._loop.time()
        if len(self._going) >= self._max_turns:
            longest = next(iter(self._going))
            left = longest.since + self._patience_s - now
            if left > 0:
                self._timer = self._loop.call_later(left, self._look)
                return
            del self._going[longest]
            longest.lose()
        turn = self._next()
        turn.since = now
        self._going[turn] = None
        if not turn.granted.done():
            turn.granted.set_result(None)
        if self._known or self._strangers:
            self._look_soon()

    def _next(self) -> Turn:
        waiting = self._known or self._strangers
        address, queue = next(iter(waiting.items()))
        turn = queue.popleft()
        del waiting[address]
        if queue:
            waiting[address] = queue
        return turn
