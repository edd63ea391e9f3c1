"""Breaking glass, ending it, and reviewing it: on record before it takes effect, and loud."""

from __future__ import annotations

from functools import partial

import msgspec
from ulid import ULID

from keybroker.authority.acts import Act, Acts
from keybroker.authority.approvals import People
from keybroker.authority.generation import Generation
from keybroker.authority.glass import Glass
from keybroker.authority.journal import Entry, Journal
from keybroker.authority.metrics import AuthorityMetrics
from keybroker.authority.security_events import SecurityEvents
from keybroker.authority.store import glass as stored
from keybroker.authority.timekeeper import Timekeeper
from keybroker.authority.uses import Asker
from keybroker.clock import to_rfc3339
from keybroker.errors import ClockUntrustedError, InvalidError, NotFoundError, OverloadedError, RefusalError
from keybroker.model.call import BreakGlass, CloseGlass, GlassesReply, GlassReply, GlassView
from keybroker.model.decision import ContentInput, TargetInput
from keybroker.model.glass import BrokenGlass
from keybroker.model.record import RecordKind
from keybroker.model.request import MAX_REASON_CHARACTERS
from keybroker.telemetry import logger

MAX_UNREVIEWED = 100  # by one identity

_log = logger()


class Breakers:
    """Does what those ask for who may break glass.

    Args:
        max_s: how long it may last at most.
    """

    def __init__(
        self,
        *,
        acts: Acts,
        glass: Glass,
        people: People,
        journal: Journal,
        generation: Generation,
        security: SecurityEvents,
        metrics: AuthorityMetrics,
        timekeeper: Timekeeper,
        max_s: int,
    ) -> None:
        self._acts = acts
        self._glass = glass
        self._people = people
        self._journal = journal
        self._generation = generation
        self._security = security
        self._metrics = metrics
        self._timekeeper = timekeeper
        self._max_s = max_s
        metrics.glass(len(glass.all()))

    async def open(self, asker: Asker, ask: BreakGlass) -> GlassReply:
        """Waive hours, limits and quorum of one grant for a while.

        Raises:
            InvalidError: no reason, or too long a time.
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            ClockUntrustedError: nobody could say when it ends.
            AuditUnavailableError: not on record, and so not in force.
        """
        self._check(ask)
        content = ContentInput("break-glass", 0, "", {"seconds": str(ask.seconds)})
        act = Act.of(asker, "break-glass", TargetInput("grant", ask.grant), ask.reason, content)
        decision = await self._acts.require(act)
        by = asker.caller.id.text
        try:
            moment = self._timekeeper.look()
            if moment.distrusted:
                raise ClockUntrustedError("The broker's clock cannot be trusted now, so nobody could say when this ends.", retry_after=60)
            if sum(each.by == by for each in self._glass.all()) >= MAX_UNREVIEWED:
                raise OverloadedError("Too much that you have opened waits to be reviewed.", retry_after=60)
            until_us = moment.time_us + ask.seconds * 1_000_000
            glass = BrokenGlass(str(ULID()), ask.grant, ask.reason, by, self._people.person_of(by), moment.time_us, until_us)
            body = {"change": "break-glass-open", "break_glass": glass.id, "until": to_rfc3339(until_us)}
            await self._journal.write(Entry(act.draft(RecordKind.ADMIN, decision, body), also=partial(stored.put, glass=glass)))
        except RefusalError as err:
            await self._acts.refuse(act, decision, err)
            raise
        self._change(partial(self._glass.put, glass))
        self._security.note("glass-broken", f"{glass.id}: grant {glass.grant}, by {by}"[:300])
        _log.critical("glass broken", break_glass=glass.id, grant=glass.grant)
        return GlassReply(self._view(glass))

    async def close(self, asker: Asker, ask: CloseGlass) -> GlassReply:
        """End it now. By somebody else than who opened it, this is the review, and closes it for good.

        Raises:
            NotFoundError: there is no such thing that has not been reviewed.
            InvalidError: a review says nothing.
            DeniedError, FrozenError, PolicyFailedError, PolicyUnavailableError: the rules do not let this caller.
            AuditUnavailableError: not on record, and so not done.
        """
        glass = self._glass.find(ask.glass)
        if glass is None:
            raise NotFoundError("There is nothing of that id to be reviewed, or it is not for you.")
        if not ask.note.strip() or len(ask.note) > MAX_REASON_CHARACTERS:
            raise InvalidError(
                "The note cannot be one.", pointers=(("/note", f"say what was found, in 1 to {MAX_REASON_CHARACTERS} characters"),)
            )
        act = Act.of(asker, "break-glass", TargetInput("grant", glass.grant), ask.note)
        decision = await self._acts.require(act)
        ended = msgspec.structs.replace(glass, until_us=min(glass.until_us, self._timekeeper.look().time_us))
        is_review = not self._is_own(glass, asker.caller.id.text)
        change = "break-glass-review" if is_review else "break-glass-end"
        draft = act.draft(RecordKind.ADMIN, decision, {"change": change, "break_glass": glass.id})
        also = partial(stored.remove, number=glass.id) if is_review else partial(stored.put, glass=ended)
        await self._journal.write(Entry(draft, also=also))
        self._change(partial(self._glass.remove, glass.id) if is_review else partial(self._glass.put, ended))
        _log.warning("glass closed", break_glass=glass.id, review=is_review)
        return GlassReply(msgspec.structs.replace(self._view(ended), is_open=False, is_reviewed=is_review))

    async def list(self, asker: Asker) -> GlassesReply:
        """What has not been reviewed, of what the caller may open or close."""
        seen = [each for each in self._glass.all() if await self._acts.is_allowed(asker, "break-glass", TargetInput("grant", each.grant))]
        return GlassesReply(tuple(map(self._view, seen)))

    def _is_own(self, glass: BrokenGlass, identity: str) -> bool:
        """Whether an identity is who opened it, or belongs to the same person: then, or by the rules of now."""
        person = self._people.person_of(identity)
        return identity == glass.by or bool(person and person in {glass.person, self._people.person_of(glass.by)})

    def _change(self, change: partial[None]) -> None:
        change()
        self._generation.advance()
        self._metrics.glass(len(self._glass.all()))

    def _view(self, glass: BrokenGlass) -> GlassView:
        times = to_rfc3339(glass.opened_us), to_rfc3339(glass.until_us)
        return GlassView(glass.id, glass.grant, glass.reason, glass.by, *times, self._glass.is_open(glass), is_reviewed=False)

    def _check(self, ask: BreakGlass) -> None:
        faults: list[tuple[str, str]] = []
        if not 1 <= ask.seconds <= self._max_s:
            faults.append(("/seconds", f"from 1 to {self._max_s}"))
        if not ask.reason.strip() or len(ask.reason) > MAX_REASON_CHARACTERS:
            faults.append(("/reason", f"say why, in 1 to {MAX_REASON_CHARACTERS} characters"))
        if not 1 <= len(ask.grant) <= 64:
            faults.append(("/grant", "the id of a grant"))
        if faults:
            raise InvalidError("The request is not what this route takes.", pointers=tuple(faults))
