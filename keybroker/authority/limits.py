"""Rate limits: never more than `max` uses in any window, whatever happens (docs/adr/0019-limits-are-kept-in-the-intents-transaction.md).

Units are taken in the transaction of the intent, so whoever sees an intent sees its units, and a crash leaves both or neither. What a
transaction has taken, the next use in the same transaction sees. Time is steady time (`timekeeper`), which no setting of the clock moves.

A limit holds if its `max`-th last unit has left the window. Up to `EXACT` each unit has a row of its own. Above that, up to a thousandth
of `max` units share a row, and leave together when the last of them does: never over the limit, and less than 0.1 % under it.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from keybroker.audit.leaf import canonical
from keybroker.authority.store.units import UnitRow, UnitTable
from keybroker.model.call import LimitLeft
from keybroker.model.decision import Limit, Obligation

EXACT = 10_000
SHARES = 1_000


@dataclass(frozen=True, slots=True)
class Subject:
    """Whose use it is: what limits are counted apart by. `principal` is empty for a use on nobody's behalf."""

    workload: str
    key: str
    principal: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit that may be taken.

    Attributes:
        newest: the row of the unit that was taken last, None if there is none.
        gone: units up to this one have left their window and can be forgotten; 0 for none.
    """

    grant: str
    limit: Limit
    counter: bytes
    newest: UnitRow | None
    gone: int


@dataclass(frozen=True, slots=True)
class Spent:
    """A limit that has no unit left; the next one is there after `until_us`, steady time."""

    grant: str
    limit: Limit
    until_us: int


@functools.lru_cache(maxsize=65_536)
def counter_of(grant: str, window_s: int, per: str, subject: Subject) -> bytes:
    """The name of a counter, 16 bytes."""
    which = "" if per == "grant" else getattr(subject, per)
    return hashlib.blake2b(canonical((grant, window_s, per, which)), digest_size=16).digest()


def seconds_until(until_us: int, now_us: int) -> int:
    """Whole seconds after which a unit that leaves its window at `until_us` has left it."""
    return (until_us - now_us) // 1_000_000 + 1


class Limits:
    """Asks and takes; called by the journal's thread, inside its transaction."""

    def __init__(self, units: UnitTable) -> None:
        self._units = units

    def ask(self, obligation: Obligation, subject: Subject, now_us: int) -> tuple[list[Unit], list[Spent]]:
        """What a use would take of each limit of an obligation, and which limits have nothing left.

        Args:
            now_us: steady time.
        """
        free: list[Unit] = []
        spent: list[Spent] = []
        for limit in obligation.limits:
            counter = counter_of(obligation.grant, limit.window_s, limit.per, subject)
            found = self._find(obligation.grant, limit, counter, now_us)
            if isinstance(found, Unit):
                free.append(found)
            else:
                spent.append(found)
        return free, spent

    def _find(self, grant: str, limit: Limit, counter: bytes, now_us: int) -> Unit | Spent:
        newest = self._units.newest(counter)
        must_be_gone = newest.seq - limit.max + 1 if newest else 0
        if must_be_gone <= 0:
            return Unit(grant, limit, counter, newest, 0)
        row = self._units.holding(counter, must_be_gone)
        if row is None or row.seq - row.units >= must_be_gone:  # forgotten, because it has left the window
            return Unit(grant, limit, counter, newest, 0)
        if row.until_us >= now_us:
            return Spent(grant, limit, row.until_us)
        return Unit(grant, limit, counter, newest, row.seq)

    def left(self, grant: str, limit: Limit, subject: Subject, now_us: int) -> LimitLeft:
        """How much of a limit is left, for a look."""
        counter = counter_of(grant, limit.window_s, limit.per, subject)
        found = self._find(grant, limit, counter, now_us)
        retry_after = seconds_until(found.until_us, now_us) if isinstance(found, Spent) else 0
        left = max(0, limit.max - self._units.in_window(counter, now_us))
        return LimitLeft(grant, limit.max, limit.window_s, limit.per, left, retry_after)

    def take(self, units: list[Unit], now_us: int) -> None:
        """Take units that were free a moment ago, in the same transaction."""
        for unit in units:
            until_us = now_us + unit.limit.window_s * 1_000_000
            newest, share = unit.newest, 1 if unit.limit.max <= EXACT else unit.limit.max // SHARES
            if newest is None:
                self._units.add(unit.counter, 1, until_us)
            elif newest.units < share:
                self._units.extend(unit.counter, newest, until_us)
            else:
                self._units.add(unit.counter, newest.seq + 1, until_us)
            if unit.gone:
                self._units.forget(unit.counter, unit.gone)
