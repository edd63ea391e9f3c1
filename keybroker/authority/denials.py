"""Denials go on record before they are answered, but a flood of them must not fill the disk.

The first denials of a caller in a second are records of their own, durable before the answer. What the same caller is denied beyond that
is answered at once and counted, and each second's count is one record for each problem code: it says how many, and stands for all of
them with the request of the first. A crash loses at most one second of such counts, never a use of a key.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass

import msgspec

from keybroker.authority.journal import Entry, Journal
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.errors import AuditUnavailableError
from keybroker.model.record import Draft

WINDOW_SECONDS = 1.0
RECORDS_PER_WINDOW = 20  # of one caller


@dataclass(slots=True)
class _Crowd:
    """Denials that are counted: how many, and the record of the first."""

    first: Draft
    count: int


class Denials:
    """Writes denials, and counts those beyond a caller's share. Bounded by callers with a valid SVID times problem codes."""

    def __init__(self, journal: Journal, metrics: AuthorityMetrics) -> None:
        self._journal = journal
        self._metrics = metrics
        self._written: Counter[str] = Counter()
        self._crowds: dict[tuple[str, str], _Crowd] = {}

    async def write(self, draft: Draft, code: str) -> None:
        """Put a denial on record, or count it.

        Args:
            draft: of kind `denial`; its trail is the caller's.
            code: of the problem that the caller gets.

        Raises:
            AuditUnavailableError: not on record, and not counted.
        """
        self._metrics.refused(code)
        if self._written[draft.trail] < RECORDS_PER_WINDOW:
            self._written[draft.trail] += 1
            await self._journal.write(_entry(draft, 1))
            return
        crowd = self._crowds.get((draft.trail, code))
        if crowd is None:
            self._crowds[draft.trail, code] = _Crowd(draft, 1)
        else:
            crowd.count += 1

    async def run(self) -> None:
        """Write the counts, every second, until cancelled."""
        while True:
            await asyncio.sleep(WINDOW_SECONDS)
            with contextlib.suppress(AuditUnavailableError):
                await self.flush()

    async def flush(self) -> None:
        """Write the counts, and begin a new window.

        Raises:
            AuditUnavailableError: not all are written; the rest is kept for the next time.
        """
        self._written.clear()
        for place, crowd in list(self._crowds.items()):
            del self._crowds[place]
            try:
                await self._journal.write(_entry(crowd.first, crowd.count))
            except AuditUnavailableError:
                later = self._crowds.get(place)  # more may have come meanwhile
                self._crowds[place] = _Crowd(crowd.first, crowd.count + (later.count if later else 0))
                raise


def _entry(draft: Draft, count: int) -> Entry:
    return Entry(msgspec.structs.replace(draft, body={**draft.body, "count": count}))
