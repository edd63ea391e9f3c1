"""Which pool of connections is in use: a new one when the SVID or the bundle is renewed, or when either end's SVID has expired.

A pool that is out of date is closed when the last call on it has ended, so that a renewal breaks nothing that is under way.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from keybroker.client.tls import Credentials

P = TypeVar("P")


class Pools(Generic[P]):
    """The pool of the day, and older ones that are still in use. For any number of threads or tasks.

    Args:
        credentials: make the TLS contexts; used by one thread at a time.
        make: a pool whose connections use a context.
    """

    def __init__(self, credentials: Credentials, make: Callable[[ssl.SSLContext], P]) -> None:
        self._credentials = credentials
        self._make = make
        self._lock = threading.Lock()
        self._context = credentials.context()
        self._current = make(self._context)
        self._users: dict[P, int] = {self._current: 0}
        self._is_ended = False

    def take(self) -> P:
        """The pool for a call that begins now. It must be given back.

        Raises:
            ConfigError: the SVID or the bundle cannot be used.
            RuntimeError: all pools have been closed.
        """
        with self._lock:
            if self._is_ended:
                raise RuntimeError("this client has been closed")
            context = self._credentials.context()
            if context is not self._context:
                self._current = self._make(context)
                self._context = context
                self._users[self._current] = 0
            self._users[self._current] += 1
            return self._current

    def give_back(self, pool: P) -> list[P]:
        """The call has ended. The pools that are out of date and that nobody uses any more: to be closed by the caller."""
        with self._lock:
            self._users[pool] -= 1
            return self._pop_idle()

    def end(self) -> list[P]:
        """No more calls. The pools that nobody uses: to be closed by the caller. Others are, when their last call has ended."""
        with self._lock:
            self._is_ended = True
            return self._pop_idle()

    def _pop_idle(self) -> list[P]:
        idle = [pool for pool, users in self._users.items() if users == 0 and (self._is_ended or pool is not self._current)]
        for pool in idle:
            del self._users[pool]
        return idle
