"""Files that decide trust, watched while the broker runs: grants, bundles, deny list.

Whatever changes is on record, raises the generation, and binds requests that are already under way. Whatever is broken is on
record too, and the old stays in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import PurePath

from keybroker.authority.generation import Generation
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.policy.holder import LivePolicy
from keybroker.authority.security_events import SecurityEvents
from keybroker.errors import AuditUnavailableError
from keybroker.identity.bundle import TrustBundles
from keybroker.identity.deny_list import DenyList
from keybroker.model.record import Draft, RecordKind
from keybroker.telemetry import logger

PERIOD_SECONDS = 0.3

_log = logger()


class Watch:
    """Looks at the files a few times a second; costs a few stat calls where nothing has changed."""

    def __init__(
        self,
        *,
        policy: LivePolicy,
        bundles: TrustBundles,
        deny_list: DenyList | None,
        generation: Generation,
        journal: Journal,
        security: SecurityEvents,
    ) -> None:
        self._policy = policy
        self._bundles = bundles
        self._deny_list = deny_list
        self._generation = generation
        self._journal = journal
        self._security = security
        self._problems: dict[str, frozenset[str]] = {}
        self._unrecorded: dict[str, str] = {}  # changes that are in force, by name, with the digest that is to go on record

    async def run(self) -> None:
        """Watch until cancelled. Rules may come over a network, and a slow one must not keep a deny list waiting."""
        async with asyncio.TaskGroup() as both:
            both.create_task(self._again_and_again(self._look_at_policy))
            both.create_task(self._again_and_again(self._look_at_files))

    async def look(self) -> None:
        """Look once."""
        await self._look_at_policy()
        await self._look_at_files()

    async def _again_and_again(self, look: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(PERIOD_SECONDS)
            try:
                await look()
            except AuditUnavailableError:
                _log.error("a change waits to be recorded until the record can be written again")
            except Exception:  # noqa: BLE001  a watcher that has died would leave old rules in force without a word
                _log.exception("watching failed")

    async def _look_at_files(self) -> None:
        problems: list[str] = []
        for name, source in (("bundles", self._bundles), ("deny-list", self._deny_list)):
            if source is None:
                continue
            if source.refresh():
                self._generation.advance()
                self._unrecorded[name] = source.digest
                _log.info("file changed", what=name)
            problems += source.problems
        for name, digest in list(self._unrecorded.items()):
            await self._journal.write(Entry(Draft(kind=RecordKind.ADMIN, body={"change": name, "to": digest})))
            del self._unrecorded[name]
        self._report("files", problems)

    def _report(self, where: str, problems: Iterable[str]) -> None:
        """Put what was not wrong the last time on record."""
        now = frozenset(problems)
        for problem in sorted(now - self._problems.get(where, frozenset())):
            _log.error("a changed file cannot be used; the old one stays in force", problem=problem)
            self._security.note("file-refused", _without_path(problem)[:200])
        self._problems[where] = now

    async def _look_at_policy(self) -> None:
        candidate = await self._policy.refresh()
        self._report("policy", self._policy.problems)
        if candidate is None:
            return
        body = {"change": "policy", "from": self._policy.engine.digest, "to": candidate.digest}
        await self._journal.write(Entry(Draft(kind=RecordKind.ADMIN, body=body)))  # on record before it takes effect
        self._policy.adopt(candidate)
        self._generation.advance()
        _log.info("policy changed", policy=candidate.digest)


def _without_path(problem: str) -> str:
    """The first line of a problem, which begins with the place that it is in: its file by name, for readers who know no path here."""
    place, separator, what = problem.splitlines()[0].partition(": ")
    return f"{PurePath(place).name}{separator}{what}"
