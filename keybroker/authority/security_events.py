"""Security events go on record, but a flood of them must not fill it: the same event within a second is one record with a count."""

from __future__ import annotations

import asyncio
import contextlib

from keybroker.authority.journal import Entry, Journal
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.errors import AuditUnavailableError
from keybroker.model.record import Draft, RecordKind
from keybroker.telemetry import logger

FLUSH_SECONDS = 1.0
_MAX_DETAILS = 16  # different details of one event in one second; the rest share one record

_log = logger()


class SecurityEvents:
    """Collects, and writes once a second."""

    def __init__(self, journal: Journal, metrics: AuthorityMetrics) -> None:
        self._journal = journal
        self._metrics = metrics
        self._counts: dict[tuple[str, str], int] = {}

    def note(self, event: str, detail: str, count: int = 1) -> None:
        """Something that should not happen has happened.

        Args:
            event: a stable name.
            detail: which one, in a few words; printable, never payload or certificate bytes.
            count: how often.
        """
        self._metrics.security(event, count)
        if (event, detail) not in self._counts and sum(name == event for name, _ in self._counts) >= _MAX_DETAILS:
            detail = "more of the same"
        self._counts[event, detail] = self._counts.get((event, detail), 0) + count

    async def run(self) -> None:
        """Write what has come, every second, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            with contextlib.suppress(AuditUnavailableError):
                await self.flush()

    async def flush(self) -> None:
        """Write what has come.

        Raises:
            AuditUnavailableError: not all are written; the rest is kept for the next time.
        """
        for event, detail in list(self._counts):
            count = self._counts.pop((event, detail))
            draft = Draft(kind=RecordKind.SECURITY, body={"event": event, "detail": detail, "count": count})
            try:
                await self._journal.write(Entry(draft))
            except AuditUnavailableError:
                self._counts[event, detail] = self._counts.get((event, detail), 0) + count
                raise
            _log.warning("security event", security_event=event, detail=detail, count=count)
