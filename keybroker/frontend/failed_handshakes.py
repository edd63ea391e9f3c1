"""Handshakes that failed go on record, not one by one: how many, why and from where, told to the authority once a second."""

from __future__ import annotations

import asyncio
from collections import Counter

from keybroker.errors import KeyBrokerError
from keybroker.frontend.authority_link import AuthorityLink
from keybroker.model.call import MAX_FAILED_HANDSHAKES

PERIOD_SECONDS = 1.0
ELSEWHERE = "elsewhere"


class FailedHandshakes:
    """Counts by result and address. Bounded: what comes from one address too many is counted as from elsewhere."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()

    def note(self, result: str, address: str) -> None:
        """A handshake with this address ended like this, or was not begun."""
        if (result, address) not in self._counts and len(self._counts) >= MAX_FAILED_HANDSHAKES // 2:
            address = ELSEWHERE
        self._counts[result, address] += 1

    async def run(self, authority: AuthorityLink) -> None:
        """Tell the authority, for ever."""
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            await self.tell(authority)

    async def tell(self, authority: AuthorityLink) -> None:
        """Tell the authority what has come; what it could not be told is kept."""
        counts, self._counts = self._counts, Counter()
        if not counts:
            return
        try:
            # The most first: the record names some, and counts the others together.
            await authority.handshakes_failed(tuple((result, address, count) for (result, address), count in counts.most_common()))
        except (KeyBrokerError, TimeoutError):
            for (result, address), count in counts.items():
                self.note(result, address)
                place = (result, address) if (result, address) in self._counts else (result, ELSEWHERE)
                self._counts[place] += count - 1
