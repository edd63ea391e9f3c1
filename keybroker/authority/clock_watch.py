"""What is told and asked about time: a clock that is distrusted, an operator who acknowledges it, time zones that were upgraded.

An operator acknowledges on the broker's host, through a file in the state directory, because whoever can write there can reset the
counters of limits anyway: it takes no right that somebody on the network could have, and a frontend that is taken over cannot do it.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from keybroker.authority import hours
from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.store.acknowledgement import ACKNOWLEDGEMENT
from keybroker.authority.timekeeper import Timekeeper
from keybroker.errors import AuditUnavailableError
from keybroker.model.record import Draft, RecordKind
from keybroker.telemetry import logger

PERIOD_SECONDS = 0.5
_ID = re.compile(r"[0-9A-Z]{26}")

_log = logger()


class ClockWatch:
    """Looks twice a second; costs a few system calls."""

    def __init__(self, timekeeper: Timekeeper, journal: Journal, security: SecurityEvents, generation: Generation, state: Path) -> None:
        self._timekeeper = timekeeper
        self._journal = journal
        self._security = security
        self._generation = generation
        self._file = state / ACKNOWLEDGEMENT
        self._told = ""
        self._zones = hours.zones_digest()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await self.look()
            except AuditUnavailableError:
                _log.error("what is to be recorded about the clock waits until the record can be written again")
            except Exception:  # noqa: BLE001  a watcher that has died would leave the clock unwatched without a word
                _log.exception("watching the clock failed")
            await asyncio.sleep(PERIOD_SECONDS)

    async def look(self) -> None:
        """Look once."""
        distrusted = self._timekeeper.look().distrusted
        if distrusted != self._told:
            self._told = distrusted
            if distrusted:
                self._security.note("clock-untrusted", distrusted.partition(" ")[2])
                _log.error("the clock is distrusted; see `keybroker clock show`", saw=distrusted)
        await self._look_for_operator(distrusted)
        await self._look_at_zones()
        if self._timekeeper.due() is not None:
            await self._journal.tick()

    async def _look_for_operator(self, distrusted: str) -> None:
        try:
            text, owner = self._file.read_text().strip(), self._file.stat().st_uid
        except (OSError, UnicodeError):
            return
        event, _, what = distrusted.partition(" ")
        if distrusted and _ID.fullmatch(text) and text == event:
            body = {"change": "clock-acknowledged", "event": event, "saw": what, "uid": str(owner)}
            await self._journal.write(Entry(Draft(kind=RecordKind.ADMIN, body=body)))  # on record before it takes effect
            self._timekeeper.acknowledge()
            _log.warning("the clock is trusted again", saw=what, uid=owner)
        else:
            _log.error("an acknowledgement of the clock names no event that there is; it was removed")
        self._file.unlink(missing_ok=True)

    async def _look_at_zones(self) -> None:
        digest = hours.zones_digest()
        if digest == self._zones:
            return
        body = {"change": "tzdata", "from": self._zones, "to": digest}
        await self._journal.write(Entry(Draft(kind=RecordKind.ADMIN, body=body)))
        self._zones = digest
        hours.forget_zones()
        self._generation.advance()
