"""What grants demand beyond a yes, judged at one moment: in the transaction of the intent, and again before the token is asked.

A demand of a grant that only observes never refuses: what it would have refused is in the intent's record. Such a use takes no unit of
that grant, as if it had been refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from keybroker.authority import hours
from keybroker.authority.limits import Limits, Spent, Subject, Unit, seconds_until
from keybroker.authority.store.units import UnitTable
from keybroker.authority.timekeeper import Moment, Timekeeper
from keybroker.errors import ClockUntrustedError, DeniedError, KeyBrokerError, PolicyFailedError, RateLimitedError, RefusalError
from keybroker.model.call import LimitLeft
from keybroker.model.decision import Decision, Obligation, Verdict


@dataclass(frozen=True, slots=True)
class Demands:
    """The obligations of a decision, and whose use they are about."""

    obligations: tuple[Obligation, ...]
    subject: Subject


@dataclass(slots=True)
class Judgement:
    """What follows for the record of the intent.

    Attributes:
        units: to be taken in the same transaction.
        observed: reasons for which grants that only observe would have refused.
    """

    units: list[Unit] = field(default_factory=list)
    observed: tuple[str, ...] = ()

    def taken(self) -> tuple[dict[str, Any], ...]:
        """The units, as the record says them."""
        return tuple({"grant": unit.grant, "per": unit.limit.per, "units": 1, "window_s": unit.limit.window_s} for unit in self.units)


def is_about_time(obligation: Obligation) -> bool:
    """Whether it takes a clock to say that an obligation holds."""
    return bool(obligation.limits or obligation.hours or obligation.not_before or obligation.not_after or obligation.cool_off_s)


class UnmetError(KeyBrokerError):
    """A demand does not hold now. `refusal` is what the caller is told."""

    def __init__(self, refusal: RefusalError) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Preview:
    """What a use would meet now: reasons against it, what would be needed, in words, and what is left of each limit."""

    reasons: tuple[str, ...]
    needs: tuple[str, ...]
    limits: tuple[LimitLeft, ...]


def judge(demands: Demands, limits: Limits, moment: Moment, record_us: int) -> Judgement:
    """Whether a use may happen now. Takes nothing yet.

    Args:
        limits: of the transaction that is under way.
        record_us: the time that the intent will have. Windows must be open then, too.

    Raises:
        UnmetError: not now (`clock-untrusted`, `denied`, `rate-limited`), or it cannot be judged on this host (`policy-error`).
    """
    judgement = Judgement()
    spent: list[Spent] = []
    for obligation in demands.obligations:
        if obligation.observe_only and obligation.quorum:  # one that binds has been asked for by now
            judgement.observed += (f"quorum:{obligation.grant}",)
        if not is_about_time(obligation):
            continue
        closed = _closed(obligation, moment, record_us)
        free, none_left = limits.ask(obligation, demands.subject, moment.steady_us) if not closed else ([], [])
        if obligation.observe_only:
            reasons = (*closed, *(f"limit:{obligation.grant}" for _ in none_left[:1]))
            judgement.observed += reasons
            judgement.units += [] if reasons else free
            continue
        if closed:
            raise UnmetError(refusal_of(closed))
        spent += none_left
        judgement.units += free
    if spent:
        raise UnmetError(_spent(spent, moment))
    return judgement


def require_open(obligations: tuple[Obligation, ...], timekeeper: Timekeeper) -> None:
    """What is looked at again once the units are taken: hours and moments, and the clock that they need. There is no grace.

    Raises:
        UnmetError: not any more.
    """
    for obligation in obligations:
        if (obligation.hours or obligation.not_before or obligation.not_after) and not obligation.observe_only:
            moment = timekeeper.look()
            closed = _closed(obligation, moment, moment.time_us)
            if closed:
                raise UnmetError(refusal_of(closed))


def as_of_now(decision: Decision, timekeeper: Timekeeper) -> Decision:
    """A decision about reading, by the moments that grants name: denied outside them, failed where nobody can tell."""
    if decision.verdict is not Verdict.ALLOW or not any(is_about_time(each) for each in decision.obligations):
        return decision
    moment = timekeeper.look()
    observed: tuple[str, ...] = ()
    for obligation in decision.obligations:
        closed = _closed(obligation, moment, moment.time_us) if is_about_time(obligation) else ()
        if closed and not obligation.observe_only:
            verdict = Verdict.FAILED if UNTRUSTED in closed else Verdict.DENY
            return replace(decision, verdict=verdict, reasons=closed, unmet=closed)
        observed += closed
    return replace(decision, observed=observed)


def preview(demands: Demands, units: UnitTable, moment: Moment) -> Preview:
    """What a use would meet now. Takes nothing."""
    limits = Limits(units)
    reasons: list[str] = []
    needs: list[str] = []
    left: list[LimitLeft] = []
    for obligation in demands.obligations:
        found = [limits.left(obligation.grant, limit, demands.subject, moment.steady_us) for limit in obligation.limits]
        left += found
        closed = _closed(obligation, moment, moment.time_us) if is_about_time(obligation) else ()
        spent = [f"limit:{each.grant}" for each in found if each.retry_after]
        if not obligation.observe_only:
            reasons += [*closed, *spent[:1]]
            needs += [_NEEDS[reason.partition(":")[0]].format(obligation.grant) for reason in closed]
            needs += [f"to wait {each.retry_after} s for a limit of {each.grant}" for each in found if each.retry_after]
    return Preview(tuple(dict.fromkeys(reasons)), tuple(dict.fromkeys(needs)), tuple(left))


UNTRUSTED = "clock-untrusted"
_NEEDS = {
    UNTRUSTED: "a clock that the broker's operator has acknowledged",
    "hours": "to be within the hours of {}",
    "not-before": "to wait until {} begins",
    "not-after": "a newer grant than {}, which has ended",
}


def refusal_of(reasons: tuple[str, ...]) -> RefusalError:
    """What the caller is told of hours that are closed, or of a clock that nobody trusts."""
    if UNTRUSTED in reasons:
        return ClockUntrustedError(
            "The broker's clock cannot be trusted now, and this grant depends on it; its operator has to look.",
            reasons=(UNTRUSTED,),
            retry_after=60,
        )
    return DeniedError("No rule allows this request at this time.", reasons=reasons)


def _closed(obligation: Obligation, moment: Moment, record_us: int) -> tuple[str, ...]:
    if moment.distrusted:
        return (UNTRUSTED,)
    try:
        closed = hours.unmet(obligation, moment.time_us)
        return closed or (hours.unmet(obligation, record_us) if record_us != moment.time_us else ())
    except ValueError as err:
        raise UnmetError(PolicyFailedError("The rules name a time zone that this host does not know.", retry_after=60)) from err


def _spent(spent: list[Spent], moment: Moment) -> RateLimitedError:
    wait_s = seconds_until(max(each.until_us for each in spent), moment.steady_us)
    reasons = tuple(dict.fromkeys(f"limit:{each.grant}" for each in spent))
    return RateLimitedError(f"A limit is reached; there is a unit again in {wait_s} s.", reasons=reasons, retry_after=wait_s)
