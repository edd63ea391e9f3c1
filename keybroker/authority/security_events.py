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

    def note(self, event: str, detail: str) -> None:
        """Something that should not happen has happened.

        Args:
            event: a stable name.
            detail: which one, in a few words; printable, never payload or certificate bytes.
        """
        self._metrics.security(event)
        if (event, detail) not in self._counts and sum(name == event for name, _ in self._counts) >= _MAX_DETAILS:
            detail = "more of the same"
        self._counts[event, detail] = self._counts.get((event, detail), 0) + 1

    async def run(self) -> None:
        """Write what has come, every second, until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            with contextlib.suppress(AuditUnavailableError):
                await self.flush()

    async def flush(self) -> None:
        """Write what has come.

        Raises:
            AuditUnavailableError: not written, and kept for the next time.
        """
        counts, self._counts = self._counts, {}
        for (event, detail), count in counts.items():
            _log.warning("security event", security_event=event, detail=detail, count=count)
            draft = Draft(kind=RecordKind.SECURITY, body={"event": event, "detail": detail, "count": count})
            try:
                await self._journal.write(Entry(draft))
            except AuditUnavailableError:
                self._counts[event, detail] = self._counts.get((event, detail), 0) + count
                raise
