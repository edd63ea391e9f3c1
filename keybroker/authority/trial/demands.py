"""What is demanded beyond a yes, one demand at a time, so that the demands of two policies can be compared.

All demands of a decision bind together. A demand is kept by another one where whoever meets that one meets it too: a limit of 50 keeps
one of 100, an earlier end keeps a later one. Limits are counted within their grant, so only a limit of the same grant keeps a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import msgspec

from keybroker.authority.policy.compiler import obligation_of, when_read_of
from keybroker.authority.policy.grants import Grant, Rules
from keybroker.authority.trial.words import duration, listed
from keybroker.model.decision import HoursWindow, Limit, Obligation, QuorumStage


@dataclass(frozen=True, slots=True)
class NotBefore:
    """From a moment on, RFC 3339."""

    moment: str


@dataclass(frozen=True, slots=True)
class NotAfter:
    """Until a moment, RFC 3339."""

    moment: str


@dataclass(frozen=True, slots=True)
class Open:
    """Within one of some hours."""

    hours: tuple[HoursWindow, ...]


@dataclass(frozen=True, slots=True)
class AtMost:
    """No more uses than a limit, counted within one grant."""

    grant: str
    limit: Limit


@dataclass(frozen=True, slots=True)
class Approved:
    """Approved by people, in stages."""

    stages: tuple[QuorumStage, ...]
    cool_off_s: int
    expires_s: int


Content = NotBefore | NotAfter | Open | AtMost | Approved


@dataclass(frozen=True, slots=True)
class Demand:
    """One demand.

    Attributes:
        is_observed: it is watched, and does not bind.
    """

    content: Content
    is_observed: bool = False

    @property
    def text(self) -> str:
        """In words."""
        return f"{_words(self.content)}{' (watched only)' if self.is_observed else ''}"

    def keeps(self, other: Demand) -> bool:
        """Whether whoever meets this demand meets another one too."""
        return (other.is_observed or not self.is_observed) and _keeps(self.content, other.content)


def demands_of(obligation: Obligation) -> frozenset[Demand]:
    """Everything that an obligation demands."""
    return frozenset(Demand(each, obligation.observe_only) for each in _contents(obligation))


def granted_demands(grant: Grant, rules: Rules, operation: str) -> frozenset[Demand]:
    """What a grant demands for an operation. Hours and limits are about uses of keys, a quorum is also about what widens access."""
    if operation == "approve":
        return frozenset()
    if operation in {"sign", "sign-digest"}:
        return demands_of(obligation_of(grant, rules))
    if operation in {"unfreeze", "admin-policy"}:
        return demands_of(msgspec.structs.replace(obligation_of(grant, rules), hours=(), limits=()))
    return demands_of(when_read_of(grant))


def demands_of_all(obligations: Iterable[Obligation]) -> frozenset[Demand]:
    """Everything that a decision demands."""
    return frozenset(demand for each in obligations for demand in demands_of(each))


def not_kept(demands: Iterable[Demand], by: Iterable[Demand]) -> frozenset[Demand]:
    """The demands that some others do not keep."""
    others = tuple(by)
    return frozenset(demand for demand in demands if not any(other.keeps(demand) for other in others))


def _contents(obligation: Obligation) -> Iterator[Content]:
    if obligation.not_before:
        yield NotBefore(obligation.not_before)
    if obligation.not_after:
        yield NotAfter(obligation.not_after)
    if obligation.hours:
        yield Open(obligation.hours)
    yield from (AtMost(obligation.grant, each) for each in obligation.limits)
    if obligation.quorum:
        yield Approved(obligation.quorum, obligation.cool_off_s, obligation.expires_s)


@singledispatch
def _keeps(one: Any, other: Content) -> bool:
    return bool(one == other)


@_keeps.register
def _(one: NotBefore, other: Content) -> bool:
    return isinstance(other, NotBefore) and one.moment >= other.moment


@_keeps.register
def _(one: NotAfter, other: Content) -> bool:
    return isinstance(other, NotAfter) and one.moment <= other.moment


@_keeps.register
def _(one: AtMost, other: Content) -> bool:
    if not isinstance(other, AtMost) or one.grant != other.grant:
        return False
    return (one.limit.window_s, one.limit.per) == (other.limit.window_s, other.limit.per) and one.limit.max <= other.limit.max


@_keeps.register
def _(one: Approved, other: Content) -> bool:
    if not isinstance(other, Approved) or len(one.stages) != len(other.stages):
        return False
    are_strict = one.cool_off_s >= other.cool_off_s and one.expires_s <= other.expires_s
    pairs = zip(one.stages, other.stages, strict=True)
    return are_strict and all(mine.approvals >= its.approvals and set(mine.people) <= set(its.people) for mine, its in pairs)


@singledispatch
def _words(content: Any) -> str:
    raise TypeError(content)


@_words.register
def _(content: NotBefore) -> str:
    return f"not before {content.moment}"


@_words.register
def _(content: NotAfter) -> str:
    return f"not after {content.moment}"


@_words.register
def _(content: Open) -> str:
    return f"only {' or '.join(map(_hours, content.hours))}"


@_words.register
def _(content: AtMost) -> str:
    limit = content.limit
    apart = "for all uses of the grant together" if limit.per == "grant" else f"for each {limit.per}"
    return f"at most {limit.max} {'use' if limit.max == 1 else 'uses'} in any {duration(limit.window_s)}, {apart} ({content.grant})"


@_words.register
def _(content: Approved) -> str:
    stages = ", then ".join(f"{each.approvals} of {listed(each.people)} ({listed(each.of)})" for each in content.stages)
    wait = f", {duration(content.cool_off_s)} after the last approval" if content.cool_off_s else ""
    return f"approved by {stages}, within {duration(content.expires_s)}{wait}"


def _hours(hours: HoursWindow) -> str:
    excluded = f" except on {listed(hours.excluded)}" if hours.excluded else ""
    return f"{listed(hours.days)} from {hours.opens} to {hours.closes}, {hours.zone}{excluded}"
