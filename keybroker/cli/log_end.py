"""The end of the record: its newest records, and what comes after them.

Each look at the record is itself recorded, so there are few: two to find the newest records of a log of any size, then one every
second while there is news, and ever fewer, down to one in ten seconds, while there is none.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from keybroker.cli import output
from keybroker.cli.moments import moment
from keybroker.clock import SystemClock
from keybroker.errors import RefusalError

if TYPE_CHECKING:
    from keybroker.client import Client, Record, RecordFilters

MIN_PAUSE_S = 1.0
MAX_PAUSE_S = 10.0
_PAGE = 1_000
_SKEW = "5m"  # by which our clock may be ahead of the broker's without costing a look
_FIRST_SPAN = 100
_SPAN_FACTOR = 10


class LogEnd:
    """The newest records that match some filters. Our own reads are left out, unless the filters ask for reads.

    So are `heads` records, which follow each burst of others: they would keep us looking, and our looks would keep them coming.

    Args:
        broker: whom to ask.
        filters: as for `Client.records`.
        sleep: waits so many seconds.
    """

    def __init__(self, broker: Client, filters: RecordFilters, sleep: Callable[[float], None] = time.sleep) -> None:
        self._broker = broker
        self._filters = filters
        self._sleep = sleep
        self._ourselves = broker.whoami().spiffe_id
        self._last = -1  # index of the last record that was looked at

    def newest(self, count: int) -> list[Record]:
        """So many records, oldest first: looks back a little way, then ten times as far, and so on."""
        end = self._size()
        self._last = end - 1
        found: list[Record] = []
        span = max(_FIRST_SPAN, 2 * count)
        while end > 0 and len(found) < count:
            begin = max(end - span, 0)
            older = (record for record in self._from(begin, end) if self._is_wanted(record))
            found = [*deque(older, maxlen=count - len(found)), *found]
            end, span = begin, span * _SPAN_FACTOR
        return found

    def following(self) -> Iterator[Record]:
        """What comes after `newest`, as it comes, without an end. An outage of the broker is told on stderr and waited out."""
        pause = MIN_PAUSE_S
        while True:
            self._sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)
            for record in self._news():
                if not self._is_ours(record):
                    pause = MIN_PAUSE_S
                yield record

    def _news(self) -> Iterator[Record]:
        from keybroker.client import BrokerUnreachableError

        try:
            for record in self._from(self._last + 1):
                self._last = record.index
                if self._is_wanted(record):
                    yield record
        except (BrokerUnreachableError, RefusalError) as err:
            if isinstance(err, RefusalError) and not err.retry_after:
                raise
            output.note(f"still following: {output.visible(str(err))}")

    def _size(self) -> int:
        """How many records there were when it was asked: the index of the record of this very question."""
        since = moment(_SKEW, SystemClock().now_us())
        for earliest in (since, ""):  # nothing at all since then: our clock is too far ahead
            found = list(self._broker.iter_records(workload=self._ourselves, kind="read", since=earliest))
            if found:
                return found[-1].index
        return 0

    def _from(self, begin: int, end: int | None = None) -> Iterator[Record]:
        """Matching records from one index to before another, page by page. A cursor is the index of the last record that was seen."""
        cursor: str | None = str(begin - 1) if begin else ""
        while cursor is not None:
            page = self._broker.records(**self._filters, cursor=cursor, limit=_PAGE)
            for record in page.records:
                if end is not None and record.index >= end:
                    return
                yield record
            cursor = page.next

    def _is_wanted(self, record: Record) -> bool:
        return not self._is_ours(record) or self._filters.get("kind") == record.kind

    def _is_ours(self, record: Record) -> bool:
        return record.kind == "heads" or (record.kind == "read" and record.trail == self._ourselves)
