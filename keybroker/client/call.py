"""One call to a broker, apart from sending it: how long it may take, whether it is tried again and after which pause.

RFC 9110 sections 9.2.2 (what may be repeated) and 10.2.3 (Retry-After). No I/O.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from keybroker.client.errors import BrokerUnreachableError
from keybroker.errors import InProgressError, KeyBrokerError, RefusalError

MAX_ATTEMPTS = 5
_FIRST_PAUSE_S = 0.1


class Call:
    """The attempts of one call.

    Args:
        is_repeatable: whether asking twice does no more than asking once. If not, there is one attempt.
        timeout_s: seconds for all attempts and pauses together.
        clock: seconds that never go back.
        spread: a number from 0 to 1, to keep many clients from coming back at the same moment.

    Attributes:
        deadline: when it ends, by the clock.
    """

    def __init__(
        self,
        *,
        is_repeatable: bool,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self.deadline = clock() + timeout_s
        self._is_repeatable = is_repeatable
        self._clock = clock
        self._spread = spread
        self._attempts = 0

    @property
    def left(self) -> float:
        """Seconds until the deadline; not below 0."""
        return max(self.deadline - self._clock(), 0.0)

    def pause_after(self, err: KeyBrokerError) -> float:
        """Seconds to wait before the next attempt: what the broker asked for, and a pause that doubles, from half of it to one and a half.

        Raises:
            KeyBrokerError: `err`, if there is to be no other attempt.
        """
        self._attempts += 1
        pause = _FIRST_PAUSE_S * 2.0 ** (self._attempts - 1) * (0.5 + self._spread())
        if isinstance(err, RefusalError):
            pause += err.retry_after
        if not self._is_repeatable or not _is_passing(err) or self._attempts >= MAX_ATTEMPTS or pause >= self.left:
            raise err
        return pause


def _is_passing(err: KeyBrokerError) -> bool:
    """Whether the same question may get another answer soon."""
    if isinstance(err, RefusalError):
        return err.retry_after > 0 or isinstance(err, InProgressError)
    return isinstance(err, BrokerUnreachableError)
