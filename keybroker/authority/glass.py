"""Break-glass: who has waived what a grant demands, until when, and what nobody has reviewed yet.

What it waives is hours, limits and quorum of one grant. Grants that name the moment of their end have ended all the same, denies deny, and
freezes freeze. It ends by the clock; while nobody can trust the clock, it waives nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from keybroker.authority.timekeeper import Timekeeper
from keybroker.model.decision import Decision, Obligation
from keybroker.model.glass import BrokenGlass


class Glass:
    """Everything that was opened and has not been reviewed."""

    def __init__(self, stored: Iterable[BrokenGlass], timekeeper: Timekeeper) -> None:
        self._by_id = {each.id: each for each in stored}
        self._timekeeper = timekeeper

    def all(self) -> tuple[BrokenGlass, ...]:
        """What has not been reviewed, oldest first."""
        return tuple(self._by_id[each] for each in sorted(self._by_id))

    def find(self, number: str) -> BrokenGlass | None:
        """One of these by its id, or None."""
        return self._by_id.get(number)

    def put(self, glass: BrokenGlass) -> None:
        """It was opened, or ends earlier than it did."""
        self._by_id[glass.id] = glass

    def remove(self, number: str) -> None:
        """It has been reviewed."""
        self._by_id.pop(number, None)

    def is_open(self, glass: BrokenGlass) -> bool:
        """Whether it waives anything now."""
        moment = self._timekeeper.look()
        return not moment.distrusted and moment.time_us < glass.until_us

    def relieved(self, decision: Decision) -> tuple[Decision, tuple[str, ...]]:
        """A decision without the demands that are waived now, and the ids of what waives them. What the record keeps stays whole."""
        if not self._by_id or not decision.obligations:
            return decision, ()
        demanding = {each.grant for each in decision.obligations if each.hours or each.limits or each.quorum}
        open_now = [each for each in self.all() if each.grant in demanding and self.is_open(each)]
        if not open_now:
            return decision, ()
        waived = {each.grant for each in open_now}
        obligations = tuple(_waived(each) if each.grant in waived else each for each in decision.obligations)
        return replace(decision, obligations=obligations), tuple(each.id for each in open_now)


def _waived(obligation: Obligation) -> Obligation:
    return msgspec.structs.replace(obligation, hours=(), limits=(), quorum=(), cool_off_s=0, expires_s=0)
